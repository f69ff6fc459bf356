"""How many replicas a load needs: a model, and a simulation beside it."""
