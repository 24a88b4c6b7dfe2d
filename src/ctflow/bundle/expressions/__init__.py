"""`$` expressions of a configuration: a small, total subset of Python, walked as a tree; nothing is executed."""
