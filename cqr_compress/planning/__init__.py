"""Planning of a conversion: find the tables of a checkpoint, and choose a layout for each."""
