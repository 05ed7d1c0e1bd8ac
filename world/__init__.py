"""The small world: its facts, its tasks, and the one scorer."""
