"""Loading of compressed files by other libraries' own functions."""
