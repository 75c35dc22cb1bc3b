"""The generator that a checkpoint carries in its folder `vlora/`: what `vlora-train` leaves for the steps behind it.

Light: no torch before weights are read or written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from regraft.core.checkpoint import CONFIG, Checkpoint, FileRef
from regraft.core.errors import InputError
from regraft.core.jsonio import difference
from regraft.core.tensors import LazyTensor, MemoryTensor, WeightFile
from regraft.core.transformation import Run
from regraft.plugins.vlora.folder import WEIGHTS, GeneratorFolder, save_generator
from regraft.plugins.vlora.settings import GeneratorSettings, faults

if TYPE_CHECKING:
    from regraft.plugins.vlora.generator import PerceptualGenerator

OWN = "vlora"
OWN_CONFIG, OWN_WEIGHTS = f"{OWN}/{CONFIG}", f"{OWN}/{WEIGHTS}"


def own_settings(checkpoint: Checkpoint) -> GeneratorSettings | None:
    """Settings of the generator that an earlier step of the recipe has put into the checkpoint; None without one.

    Raises:
        InputError: they are not valid.
    """
    if not {OWN_CONFIG, OWN_WEIGHTS} <= set(checkpoint.files):
        return None
    try:
        return GeneratorSettings.model_validate(dict(checkpoint.json(OWN_CONFIG)))
    except ValidationError as error:
        raise InputError(
            "is no valid configuration of a generator", where=f"{checkpoint.label}: {OWN_CONFIG}", found=faults(error),
            remedy="train the generator again",
        ) from None  # fmt: skip


def own_generator(checkpoint: Checkpoint) -> GeneratorFolder | None:
    """The generator itself, once the step that makes it has run."""
    settings = own_settings(checkpoint)
    if settings is None:
        return None
    return GeneratorFolder(f"{checkpoint.label}: {OWN}", settings, _tensors(checkpoint.files[OWN_WEIGHTS]), {})


def config_change(checkpoint: Checkpoint, settings: GeneratorSettings) -> dict[str, Any]:
    """The merge patch that makes `vlora/config.json` say `settings`: as JSON, a plan knows it before the run."""
    return difference(checkpoint.json(OWN_CONFIG), settings.model_dump(mode="json", exclude_none=True))


def weights_file(generator: PerceptualGenerator, run: Run) -> FileRef:
    """The generator's weights, fp32, for `Patch.files`: a file of this process where the run has room for one."""
    import tempfile
    from pathlib import Path

    if run.cache is not None:
        folder = run.cache / f"{OWN}-{run.step}-{run.rank}"
        save_generator(generator, folder)
        return FileRef(path=folder / WEIGHTS)
    with tempfile.TemporaryDirectory(prefix="regraft-") as scratch:
        save_generator(generator, Path(scratch))
        return FileRef(data=Path(scratch, WEIGHTS).read_bytes())


def _tensors(file: FileRef) -> dict[str, LazyTensor]:
    if file.path is not None:
        return dict(WeightFile(file.path).tensors())
    from safetensors.torch import load

    return {name: MemoryTensor(name, tensor) for name, tensor in load(file.read()).items()}
