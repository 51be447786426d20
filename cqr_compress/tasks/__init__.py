"""Built-in tasks: common models on common data formats, without a task file."""
