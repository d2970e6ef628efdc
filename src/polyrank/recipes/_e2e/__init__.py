"""Parts of the recipe `e2e`."""
