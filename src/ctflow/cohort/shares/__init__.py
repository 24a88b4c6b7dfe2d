"""A share of a cohort on one machine, from its rows to their commits."""
