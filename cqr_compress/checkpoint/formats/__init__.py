"""Formats of dense checkpoints, read without executing code from a file."""
