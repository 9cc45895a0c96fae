"""What exists while a model runs: packed weights, their binding to graphs, packed modules, checkpoints."""
