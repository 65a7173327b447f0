"""Alignment: the units of one model are put into the order of another's, or carried to them, before a merge."""
