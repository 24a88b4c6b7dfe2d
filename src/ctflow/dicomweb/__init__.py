"""What servers and clients of DICOMweb (DICOM PS3.18) have in common: node and cohort are both."""
