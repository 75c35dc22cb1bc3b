"""Files for the examples of `vlora` and `vlora-train`: a tiny random generator, and features that it reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from regraft.core.architectures import architecture_of
from regraft.core.checkpoint import Checkpoint

PATCHES, WIDTH = 4, 12
"""Features of an image, and the width of each."""

SIZES = {"dim": 16, "depth": 1, "heads": 2, "rank": 2, "every": 1}
"""Those of `new` in vlora-train; the types are all that can be merged into the model."""


def write_features(file: Path, names: Iterable[str]) -> Path:
    """Write random features [PATCHES, WIDTH] of some images, and return the file."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(PATCHES, WIDTH, generator=random) for name in names}, file)
    return file


def write_generator(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write a generator for `checkpoint` whose deltas are random, and return its folder."""
    import torch

    from regraft.plugins.vlora.folder import save_generator
    from regraft.plugins.vlora.generator import new_generator
    from regraft.plugins.vlora.settings import settings_for
    from regraft.plugins.vlora.widen import mergeable_types

    architecture = architecture_of(checkpoint.config, checkpoint.specs)
    sizes = {key: value for key, value in SIZES.items() if key != "every"}
    settings = settings_for(
        architecture, types=mergeable_types(architecture), skip_layers=SIZES["every"], visual_dim=WIDTH,
        pos_num=PATCHES, **sizes,
    )  # fmt: skip
    generator = new_generator(settings, 0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in generator.B.values():
            # zero in a new generator, so that it would not change the model
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    save_generator(generator, folder)
    return folder
