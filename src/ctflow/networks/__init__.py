"""Which rewrites make a network fast?"""
