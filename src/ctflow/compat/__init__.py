"""What ctflow needs other libraries to do differently, for as long as one of its own calls needs it.

One module a library. Importing one changes nothing; its context managers do, and take it back.
"""
