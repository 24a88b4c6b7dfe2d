"""The worker pool: one process per GPU (or one for the CPU)."""
