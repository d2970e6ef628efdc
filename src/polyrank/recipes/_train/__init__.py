"""Parts of the recipe `train`: a user's own file."""
