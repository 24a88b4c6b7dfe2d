"""Changes to other libraries, each only for as long as one of ctflow's own calls needs it.

One module per library, with the versions that it was read for, the reason and the upstream issue; tests/unit/compat
fails when the library changes. Importing a module changes nothing: its context managers make a change and undo it,
and only ctflow's own entry points make lasting changes.
"""
