"""The compressed table: its spec, its tensors, and the decoding of rows."""
