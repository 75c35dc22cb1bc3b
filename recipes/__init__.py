"""Recipes that ship with regraft."""
