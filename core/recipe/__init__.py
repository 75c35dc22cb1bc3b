"""Recipes: parsing with positions, `extends`, `--set`, validation, JSON Schema, the recipes that ship with regraft.

Nothing here imports torch or transformers.
"""
