"""The student and its teacher as Hugging Face models: loading, adapters, and the tiny base model with its warm start."""
