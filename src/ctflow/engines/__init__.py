"""Who computes one batch?"""
