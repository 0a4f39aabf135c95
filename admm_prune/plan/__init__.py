"""What a run will take, before anything is loaded: bytes by part, operations and time by phase."""
