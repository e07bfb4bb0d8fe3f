"""Plans of a recipe's stages, and running them."""
