"""Tools that prove properties of the code: forty breaks that tests find, and walks through it."""
