"""Results as pictures and pages, for a PACS that shows nothing else."""
