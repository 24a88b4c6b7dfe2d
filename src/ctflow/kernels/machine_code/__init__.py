"""Machine code of kernels: what it is compiled from and for, how it is compiled, kept and launched."""
