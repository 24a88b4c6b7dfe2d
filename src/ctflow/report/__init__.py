"""Everything that a user sees."""
