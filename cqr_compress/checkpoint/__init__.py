"""Files: dense checkpoints are read, compressed ones are read and written."""
