"""Weights that a solver keeps beside the trained weights: best state and EMA."""
