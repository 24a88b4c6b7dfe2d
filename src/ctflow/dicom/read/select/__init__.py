"""Which series ctflow runs, and why it rejects the others."""
