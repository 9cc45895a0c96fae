"""What compressed caches need to know beforehand: projection bases and ranks, channel orders, token scores. Pure functions on tensors."""
