"""Engine settings by successive halving over real runs."""
