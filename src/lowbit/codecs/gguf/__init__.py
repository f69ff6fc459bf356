"""GGUF, the file format of llama.cpp: container, architectures, vocabularies, and the named mixes of types."""
