"""Files to Volume: scan, choose, order, decode, assemble."""
