"""What evaluate.py composes: settings, steps, subjects, statistics, tables, the page. `python -m study` lists its jobs."""
