"""From mask to numbers: findings, lengths, and plausibility checks."""
