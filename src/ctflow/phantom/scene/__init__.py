"""Content of real scans beyond the chest: tables, clothes, metal, padding."""
