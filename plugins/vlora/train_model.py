"""Language model and generator as one module, for the training loop; and the loss of image-text rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regraft.core.training.head import Head
from regraft.core.training.model import switch_gradient_checkpointing
from regraft.core.training.weights import Trainable, select
from regraft.plugins.vlora.generator import Block, PerceptualGenerator
from regraft.plugins.vlora.train_attach import Attached
from regraft.plugins.vlora.train_data import Picture, ShownBatch

LANGUAGE, GENERATOR = "language", "generator"


class Sighted(torch.nn.Module):
    """Holds both, so that the loop freezes, trains and shares out the weights of both; the objective runs them.

    Args:
        language: from `materialise_model`.
        generator: for it.
    """

    def __init__(self, language: Any, generator: PerceptualGenerator) -> None:
        super().__init__()
        self.language, self.generator = language, generator
        layers = set(getattr(language, "_no_split_modules", None) or ())
        self._no_split_modules = sorted({*layers, Block.__name__})

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Of the language model, which holds nearly all activations."""
        del options
        switch_gradient_checkpointing(self.language)

    def trainable(self, stage: str) -> dict[str, Trainable]:
        """What learns: the generator, in stage `both` the language model too."""
        names = [name for name, _ in self.named_parameters()]
        return select(self, [name for name in names if stage == "both" or name.startswith(f"{GENERATOR}.")])


@dataclass(frozen=True)
class SeenAnswers:
    """Cross-entropy of the answers, in nats, of a language model that sees each row's picture; the unit is a token.

    Args:
        head: of the language model.
        generator: of the deltas.
        attached: where they act; it must be `attached` to the model when this is called.
        look: features [M, patches, width] of M pictures, fp32.
    """

    head: Head
    generator: PerceptualGenerator
    attached: Attached
    look: Callable[[Sequence[Picture]], torch.Tensor]

    def __call__(self, batch: ShownBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The sum over learnt tokens."""
        self.see(batch)
        return self.head.label_losses(batch.batch), {}

    def see(self, batch: ShownBatch) -> None:
        """Show the rows of `batch` their pictures.

        Text alone runs the generator too, on nothing, and drops what it makes: its weights get a gradient of zero, and
        processes that share them out run the same modules.
        """
        settings, device = self.generator.settings, batch.rows.device
        if batch.pictures:
            features = self.look(batch.pictures).to(device)
        else:
            features = torch.zeros(1, settings.pos_num, settings.visual_dim, device=device)
        dtype = self.generator.pos_embed.dtype
        self.attached.see(self.generator(features.to(dtype)), batch.rows)

    def identity(self) -> Mapping[str, Any]:
        """Its name."""
        return {"name": "answers by sight"}
