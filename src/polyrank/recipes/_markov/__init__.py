"""Parts of the recipe `markov`."""
