"""Mask to numbers: findings, lengths, and which of them cannot be right."""
