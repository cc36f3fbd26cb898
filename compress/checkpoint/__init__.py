"""Hugging Face checkpoints on disk: find, read one tensor at a time, write atomically."""
