"""What an edit does to a cache, without a model: where each token's key lies and for which position it was rotated."""
