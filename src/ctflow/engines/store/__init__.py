"""Made engine files, kept under the key of all they depend on."""
