"""Object stores, with the patience that networks need."""
