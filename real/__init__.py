"""The study on a real language model: `python -m real MODEL`."""
