"""From a checkpoint to plans: which tensors are tables, and how each is compressed."""
