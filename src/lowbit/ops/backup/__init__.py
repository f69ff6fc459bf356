"""Backups: content-addressed, resumable, proven by hashes."""
