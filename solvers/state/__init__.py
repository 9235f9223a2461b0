"""State of a solver: registered sources and how a state loads into them."""
