"""FX graph rewrites. A pass takes a graph and a recipe and leaves a Decision for every site it looked at."""
