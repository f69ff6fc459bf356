"""The embedded demo model: its text, its training script and its weights."""
