"""Tiny models: those of `regraft.testing`, and what only our own tests ask of them."""

from regraft.core.testing.models import CONFIGS, FAMILIES, OUTSIDE_TABLE, VARIANTS, save_tiny, save_tokenizer, tiny

__all__ = ["CONFIGS", "FAMILIES", "OUTSIDE_TABLE", "VARIANTS", "save_tiny", "save_tokenizer", "tiny"]
