"""A folder that nnU-Net trained, or a zip of it -> a `Model`, without executing anything in it."""
