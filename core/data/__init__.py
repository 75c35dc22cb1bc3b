"""Training data: from files and rows to sequences of token ids with labels."""

from regraft.core.data.settings import DataSettings

__all__ = ["DataSettings"]
