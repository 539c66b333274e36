"""A stand-in for the Hugging Face hub: tiny generated sets and models, under the real names, over HTTP."""
