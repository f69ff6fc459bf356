"""Benchmarks of models alone and of gateways under load."""
