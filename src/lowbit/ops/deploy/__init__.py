"""Deployment files from a serve configuration."""
