"""Files to Volume: scan, select, order, decode, assemble."""
