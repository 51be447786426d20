"""Data files of built-in tasks."""
