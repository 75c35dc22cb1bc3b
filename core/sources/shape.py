"""A checkpoint of which there is only config.json: names, shapes and dtype of every tensor, and no values.

For plans alone: what a recipe would need on a model that nobody has downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.core.architectures import architecture_of
from regraft.core.checkpoint import CONFIG, Checkpoint, FileRef
from regraft.core.errors import InputError, Unsupported
from regraft.core.jsonio import brief, read_object
from regraft.core.specs import CODE_OF_NAME, TensorSpec
from regraft.core.tensors import ByteRange, LazyTensor, PromisedTensor

if TYPE_CHECKING:
    from regraft.core.architectures.family import Family

_DEFAULT_DTYPE = "float32"
"""What transformers takes where a config names none."""


class ShapedTensor(PromisedTensor):
    """A tensor of a model that is not here, with the place that it would have in one large file."""

    def __init__(self, spec: TensorSpec, path: Path, offset: int) -> None:
        super().__init__(spec)
        self._place = ByteRange(path, offset, spec.nbytes)

    @property
    def raw(self) -> ByteRange:
        """Where it would be copied from."""
        return self._place


def open_shape(path: Path, families: Iterable[Family] = ()) -> Checkpoint:
    """The checkpoint that the config at `path` describes.

    A family of the table imports neither torch nor transformers; any other is built on the meta device.

    Args:
        path: a config.json, whatever its name, or a folder that holds one.
        families: of plugins.

    Raises:
        InputError: there is no such file, or it is not the config of a model.
        Unsupported: the family is unknown, or the config is that of a quantised model.
    """
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise InputError("there is no such config", where=path, expected="a config.json, or a folder that holds one",
                         remedy="check the path")  # fmt: skip
    config = read_object(file)
    if "quantization_config" in config:
        raise Unsupported("a config does not tell how quantised weights are stored", where=file,
                          remedy="take the config of the model in full precision")  # fmt: skip
    named = config.get("dtype") or config.get("torch_dtype") or _DEFAULT_DTYPE
    if named not in CODE_OF_NAME:
        raise InputError("unknown dtype", where=f"{file}: dtype", expected=" or ".join(CODE_OF_NAME),
                         found=brief(named), remedy="correct the config")  # fmt: skip
    tensors: dict[str, LazyTensor] = {}
    offset = 0
    for name, shape in architecture_of(config, families=families).expected_specs().items():
        spec = TensorSpec(name, CODE_OF_NAME[named], shape)
        tensors[name] = ShapedTensor(spec, file, offset)
        offset += spec.nbytes
    return Checkpoint(str(path), tensors, {CONFIG: FileRef(file)}, origin={"source": "shape"})
