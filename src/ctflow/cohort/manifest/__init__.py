"""The manifest of a cohort: its rows, and what writes them."""
