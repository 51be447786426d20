"""Readers of the data files of built-in tasks."""
