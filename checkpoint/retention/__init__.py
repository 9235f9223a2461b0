"""Which checkpoints stay, and why: rules, the plan by them, and the object that carries it out."""
