"""The exercises of the course: fill.py is to be written, check.py says what is right, solutions.py has answers."""
