"""What computes one batch?"""
