"""What everything else stands on: volume, model, errors, progress, whole files, processes."""
