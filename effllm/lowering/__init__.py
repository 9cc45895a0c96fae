"""Ops (what a format means in a graph), the providers that run them, and the choice between providers."""
