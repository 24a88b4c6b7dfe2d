"""Transforms of a configuration -> steps of the model, each argument checked."""
