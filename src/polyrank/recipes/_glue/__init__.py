"""Parts of the recipe `glue`."""
