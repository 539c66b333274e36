"""Training with transformers' Trainer: real inputs, the rank history, the demo."""
