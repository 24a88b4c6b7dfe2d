"""The DICOM node: receives series, runs them, sends results back, and shows its work."""
