"""How exact and how fast is it, measured where the truth is known?"""
