"""Which checkpoints stay, and why: rules, the plan by them, and who carries it out."""
