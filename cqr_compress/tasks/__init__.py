"""Built-in tasks: common models on common data, for which nobody has to write code."""
