"""Dora grids of the solvers in a clone: `dora grid NAME`."""
