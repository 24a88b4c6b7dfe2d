"""What may a person choose, and where is it read?"""
