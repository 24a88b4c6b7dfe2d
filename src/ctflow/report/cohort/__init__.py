"""What a person sees of a cohort: its page, and the lines of a run."""
