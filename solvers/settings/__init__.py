"""Configuration: keys, checks and composition."""
