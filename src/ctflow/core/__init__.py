"""The basis of everything else: volume, model, errors, progress, atomic files, processes."""
