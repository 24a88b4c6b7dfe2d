"""Extra content of real scans: tables, clothes, metal, padding."""
