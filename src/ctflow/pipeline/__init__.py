"""The pipeline of a case: find, load, segment, write; every entry point goes through these functions."""
