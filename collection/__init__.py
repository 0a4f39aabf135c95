"""The layer collection: problems from real models, best known values, proved bounds, and their independent checker."""
