"""Engines that run the tokens, behind one face each."""
