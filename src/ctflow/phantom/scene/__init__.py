"""What real scans have besides a chest: tables, clothes, metal, padding."""
