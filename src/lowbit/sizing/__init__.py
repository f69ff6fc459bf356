"""Before and around a model: what it will need, which precision to choose, and the best one that fits."""
