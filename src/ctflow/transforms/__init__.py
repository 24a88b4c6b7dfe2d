"""Volume to network input, and the exact way back to the source grid."""
