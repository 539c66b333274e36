"""A plain LoRA: its factors, its configuration, and the live model that holds it."""
