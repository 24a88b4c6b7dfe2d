"""Files to Volume, and masks to DICOM."""
