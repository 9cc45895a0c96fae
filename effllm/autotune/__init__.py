"""Cost model and machine description. The search and its store build on them."""
