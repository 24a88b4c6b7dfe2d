"""Delivery of results: one delivery thread per destination."""
