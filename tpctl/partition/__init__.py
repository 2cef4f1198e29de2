"""The algebra of tensor parallelism: which rank holds which rectangle of which weight. Standard library only."""
