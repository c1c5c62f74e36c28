"""From prompts to verified rollouts: chat templates, generation, and accuracy measured on samples."""
