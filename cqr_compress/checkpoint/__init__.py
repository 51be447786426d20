"""Files: dense checkpoints are read, compressed files are read and written."""
