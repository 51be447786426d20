"""Live models: compressed tables are put into them, loaded and saved."""
