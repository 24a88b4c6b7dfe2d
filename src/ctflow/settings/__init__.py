"""What can be set, and where is it read?"""
