"""Arguments, progress bars, exit codes."""
