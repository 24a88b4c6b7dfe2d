"""Files to Volume, and masks to DICOM."""

from __future__ import annotations

from pydicom import config

# The readers here check what they need by themselves and name it; pydicom's own warnings quote values, which may be
# patient data.
config.settings.reading_validation_mode = config.IGNORE
