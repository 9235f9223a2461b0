"""Search for state that hangs on objects."""
