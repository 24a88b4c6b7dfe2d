"""Where the results of a cohort go."""
