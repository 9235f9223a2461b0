"""The configuration: typed settings, their checks, composition with Hydra, and documentation."""
