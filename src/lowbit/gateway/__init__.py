"""One OpenAI-compatible face over many models, precisions and engines."""
