"""lowbit: from a Hugging Face checkpoint to a verified low-bit model."""

__version__ = "0.1.0"
