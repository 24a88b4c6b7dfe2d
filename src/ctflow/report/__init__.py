"""What does a user see?"""
