"""Estimators: each file here turns a model and data into numbers that a merge method uses."""
