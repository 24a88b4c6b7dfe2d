"""Slices to one regular grid, or the reason why they form none."""
