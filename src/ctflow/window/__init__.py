"""Where do we look, and how do we blend?"""
