"""The compressed table: its spec, its tensors, and how rows are decoded."""
