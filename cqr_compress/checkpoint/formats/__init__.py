"""Formats of dense checkpoints; none of them runs code from a file."""
