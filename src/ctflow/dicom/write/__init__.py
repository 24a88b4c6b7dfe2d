"""Masks to DICOM: segmentation, measurement report, secondary capture."""
