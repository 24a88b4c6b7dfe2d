"""How exact and how fast is ctflow, measured where the truth is known?"""
