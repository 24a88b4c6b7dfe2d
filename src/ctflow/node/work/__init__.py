"""The worker pool: one process a GPU (or one for the CPU)."""
