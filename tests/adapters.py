"""LoRA adapter folders: those of `regraft.testing`."""

from regraft.core.testing.adapters import write_adapter

__all__ = ["write_adapter"]
