"""How is an engine made?"""
