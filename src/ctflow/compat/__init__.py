"""What ctflow needs other libraries to do differently, for as long as one of its own calls needs it.

One module a library, with the versions that it was read for, the reason and the upstream issue; tests/unit/compat fails
where the library moves on. Importing a module changes nothing: its context managers do, and take it back, and what
lasts is called by entry points of ctflow's own alone.
"""
