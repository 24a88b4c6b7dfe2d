"""A cohort on a cluster: Ray starts workers, this process gives them rows and keeps account of each."""
