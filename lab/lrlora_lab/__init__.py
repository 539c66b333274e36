"""Experiments: methods × tasks × seeds, each at its tuned learning rate."""
