"""Records what was received, its outcome, and what is still to be sent."""
