"""Diagnoses of a checkpoint or a gateway, with what mends each."""
