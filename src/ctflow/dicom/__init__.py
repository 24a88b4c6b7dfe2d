"""Files to Volume, and masks to DICOM."""

from __future__ import annotations

import logging

from pydicom import config

# The readers here check what they need by themselves and name it; pydicom's own warnings quote values, which may be
# patient data.
config.settings.reading_validation_mode = config.IGNORE
# So do what they and their decoders log, at any level that a person may ask for.
for _library in ("pydicom", "highdicom", "pylibjpeg", "openjpeg", "rle", "jpeg_ls"):
    logging.getLogger(_library).setLevel(logging.CRITICAL + 1)
