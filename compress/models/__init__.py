"""What a block is, per model family, and how to run one without holding the model."""
