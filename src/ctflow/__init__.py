"""ctflow: a chest CT series goes in, a DICOM SEG with measurements comes out."""

__version__ = "0.1.0"
