"""Training from a recipe: data, plan, run, and the folder that needs nothing else afterwards."""
