"""Estimates of a run before anything is loaded: bytes by part, operations and time by stage."""
