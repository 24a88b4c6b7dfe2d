"""Stored engine files, each under the key of all it depends on."""
