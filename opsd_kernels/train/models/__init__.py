"""Load Hugging Face models and adapters, and make the tiny base model by its warm start."""
