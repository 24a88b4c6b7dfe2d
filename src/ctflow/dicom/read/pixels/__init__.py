"""Stored values of slices, whatever the transfer syntax."""
