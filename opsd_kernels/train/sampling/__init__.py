"""Turn prompts into verified rollouts: chat templates, generation, and accuracy measured on samples."""
