"""Files that torch saved: read without executing anything in them, and bounded before torch reads them."""
