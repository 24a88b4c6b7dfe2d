"""Which series are run, and why is each other one not?"""
