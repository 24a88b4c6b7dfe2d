"""What an administrator does beside a node."""
