"""Volume to network input, and the exact inverse to the source grid."""
