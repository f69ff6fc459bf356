"""GPUs as the driver tells of them; nothing here imports torch."""
