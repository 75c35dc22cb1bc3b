"""Architecture roles: where a model family keeps its projections, norms, embeddings and head."""

from regraft.core.architectures.family import Family, Part, Settings, embedding, head, linear, norm
from regraft.core.architectures.lookup import architecture_of
from regraft.core.architectures.roles import Architecture
from regraft.core.architectures.slot import Slot

__all__ = [
    "Architecture",
    "Family",
    "Part",
    "Settings",
    "Slot",
    "architecture_of",
    "embedding",
    "head",
    "linear",
    "norm",
]
