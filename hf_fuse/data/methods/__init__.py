"""Data selection: one file per method, one score per text."""
