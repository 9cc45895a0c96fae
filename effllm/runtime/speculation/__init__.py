"""Speculative decoding without a model: what to draft, when to stop, what to accept. Pure functions of distributions and random numbers."""
