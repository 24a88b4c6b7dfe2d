"""Where the series of a cohort are, and how they come to this machine."""
