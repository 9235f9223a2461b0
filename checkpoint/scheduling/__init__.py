"""When to save."""
