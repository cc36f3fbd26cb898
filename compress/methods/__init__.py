"""One file per method: `Config`, `collects(block, config)`, `compress(block, stats, config, run)`: tensors in, tensors out."""
