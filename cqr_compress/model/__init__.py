"""Live models: compress, swap, load and save their tables."""
