"""Thousands of series: a manifest names them, and a destination gets each one's result once."""
