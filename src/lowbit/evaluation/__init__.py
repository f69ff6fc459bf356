"""What quantization cost: perplexity, divergence, reports, and checks of a checkpoint on disk."""
