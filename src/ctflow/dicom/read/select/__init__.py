"""Select the series to run; reasons for the others."""
