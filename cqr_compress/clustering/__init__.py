"""Clustering the sketch: trainable layers whose ids are clustered while they train (arXiv:2210.05974)."""
