"""Fine-tuning of compressed models, with early stopping on held-out data."""
