"""How do studies arrive and leave? A DICOM node around the pipeline."""
