"""A stand-in for the Hugging Face hub, over HTTP, to push to."""
