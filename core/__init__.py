"""Checkpoints, patches, recipes, plans and their execution."""
