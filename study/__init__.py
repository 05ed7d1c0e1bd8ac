"""What evaluate.py composes: settings, steps, subjects, statistics, tables, page. `python -m study` lists its jobs."""
