"""What came in, what became of it, what is still to be sent."""
