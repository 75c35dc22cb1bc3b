"""Where checkpoints come from: folders, single files, the hub, GGUF, quantised checkpoints, the embedded demo."""

from regraft.core.sources.open import Reference, Source, open_checkpoint

__all__ = ["Reference", "Source", "open_checkpoint"]
