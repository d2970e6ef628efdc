"""Parts of the recipe `gpl` and of the commands of `polyrank gpl`."""
