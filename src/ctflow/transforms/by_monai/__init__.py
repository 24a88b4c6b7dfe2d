"""A bundle's own transforms, inferer and evaluator, which MONAI runs if its code may be executed."""
