"""Reception of series: the C-STORE SCP, limits for peers, completeness of a series."""
