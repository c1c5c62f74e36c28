"""The reference trainer: on-policy self-distillation in one readable file per idea. Start with loop.py."""
