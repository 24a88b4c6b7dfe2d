"""STOW-RS (DICOM PS3.18 10.5): instances that come over HTTP."""
