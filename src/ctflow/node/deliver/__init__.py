"""How results leave: a delivery thread a destination."""
