"""Walks over checkpoints: owns files, devices, progress and resume; holds one block at a time."""
