"""Pruned models in use: timing of generation, and packed storage."""
