"""What a recipe will do, worked out from headers and parameters alone, exact to the byte."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from regraft.core.adapter import adapter_of, formed, lay_out_adapter
from regraft.core.buffers import CHUNK_BYTES, unreadable
from regraft.core.cast import cast_patch
from regraft.core.checkpoint import Checkpoint
from regraft.core.data.settings import DataSettings
from regraft.core.errors import PluginError, RegraftError, ResourceError
from regraft.core.file_patterns import matched
from regraft.core.host import Host, PluginInfo
from regraft.core.layout import Layout, lay_out
from regraft.core.operations import leaves
from regraft.core.patch import Outline, Patch, overlay, promise
from regraft.core.realised import Realised
from regraft.core.recipe.nodes import shape_of
from regraft.core.sources import open_checkpoint
from regraft.core.sources.folder import CARD, LOCK
from regraft.core.tensors import LazyTensor
from regraft.core.transformation import WeightSpace

if TYPE_CHECKING:
    from regraft.core.recipe.model import Recipe, Step
    from regraft.core.transformation import AnyTransformation

BASE_CARD = "README.base.md"
"""Where the base's own model card goes; README.md is the output's."""

TORCH_RSS_BYTES = 320 << 20
"""Of a process that has imported torch."""
_INTERPRETER_RSS_BYTES = 64 << 20


@dataclass(frozen=True)
class PlannedStep:
    """One step with the transformation that does it, what that one promises, and the plugin that brings it."""

    id: str
    transformation: AnyTransformation
    params: Any
    outline: Outline
    plugin: PluginInfo

    @property
    def works_by_itself(self) -> bool:
        """Whether it computes while it makes its patch: a weight-space patch is formulas on the base, and no work."""
        return not isinstance(self.transformation, WeightSpace) and self.outline.workspace_bytes > 0


@dataclass(frozen=True)
class Plan:
    """A resolved recipe: the base as opened, the steps, and the output to the byte.

    Args:
        recipe: what was asked, and whether that is a checkpoint or an adapter.
        base: the base checkpoint, headers validated.
        steps: what each step promises.
        result: the output as a checkpoint whose changed tensors have no values yet.
        layout: its files.
        memory_bytes: bound of the peak host memory, Python and torch included.
        threads: the workers that the bound is for.
        changes: names of tensors by what happens to them, see `compare`.
        notes: what `[output]` has to say.
    """

    recipe: Recipe
    base: Checkpoint
    steps: tuple[PlannedStep, ...]
    result: Checkpoint
    layout: Layout
    memory_bytes: int
    threads: int
    changes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files and their index."""
        return sum(self.layout.files.values())

    @property
    def file_bytes(self) -> int:
        """Size of all other files, but for those known only after the run: lock file, model card, reports of steps."""
        return sum(file.nbytes for file in self.result.files.values())

    @property
    def output_bytes(self) -> int:
        """Size of the output without lock file, model card and reports."""
        return self.weight_bytes + self.file_bytes

    @property
    def left_behind(self) -> dict[str, str]:
        """Files of the base that the output lacks, with the reason; its card, which moves aside, is not one of them."""
        return {name: why for name, why in self.result.left_behind.items() if not (name == CARD and self._keeps_card)}

    @property
    def _keeps_card(self) -> bool:
        return BASE_CARD in self.result.files

    @property
    def exact(self) -> bool:
        """Whether every step knew its shapes, and that it does something; otherwise the sizes are upper bounds."""
        return all(step.outline.exact and not step.outline.or_nothing for step in self.steps)

    @property
    def computes(self) -> bool:
        """Whether any tensor is computed, or a step works by itself, so that torch is needed."""
        works = any(step.outline.workspace_bytes for step in self.steps)
        return works or any(tensor.raw is None for tensor in self.result.tensors.values())


def open_base(recipe: Recipe, host: Host) -> Checkpoint:
    """The base of `recipe`, headers validated.

    Raises:
        InputError: there is none, or it is not valid.
    """
    return open_checkpoint(recipe.base.model, revision=recipe.base.revision, extra=host.sources())


def make_plan(recipe: Recipe, base: Checkpoint, host: Host, *, threads: int) -> Plan:
    """Resolve the steps of `recipe` on its base, and lay out the output.

    Raises:
        InputError: a file that a step reads is not valid.
        Unsupported: a step cannot be applied to this base.
        PluginError: a plugin broke its contract.
    """
    checkpoint = base
    steps = list[PlannedStep]()
    for step in recipe.steps:
        planned = plan_step(step, checkpoint, host)
        if steps and not steps[-1].outline.exact:  # what stands on upper bounds is one too
            planned = replace(planned, outline=replace(planned.outline, exact=False))
        steps.append(planned)
        checkpoint = promise(checkpoint, planned.outline, by=step.id)
    recipe, form_notes = formed(recipe, base, {step.id: step.outline for step in steps})
    output = output_of(recipe, base, checkpoint, host)
    checkpoint = output.checkpoint
    layout = layout_of(recipe, checkpoint)
    memory = memory_bound(checkpoint, threads) + max((step.outline.workspace_bytes for step in steps), default=0)
    changes = changes_of(recipe, base, checkpoint)
    notes = (*form_notes, *output.notes)
    return Plan(recipe, base, tuple(steps), checkpoint, layout, memory, threads, changes, notes)


def plan_step(step: Step, checkpoint: Checkpoint, host: Host) -> PlannedStep:
    """Check one step against the checkpoint below it, and outline it.

    Raises:
        RegraftError: what the transformation says.
        PluginError: it raised anything else.
    """
    with blaming(step.id):
        transformation = host.transformations()[step.use]()
        transformation.check(checkpoint, step.params)
        outline = transformation.plan(checkpoint, step.params)
    owner = host.owners[step.use]
    plugin = next(info for info in host.plugins if info.name == owner)
    return PlannedStep(step.id, transformation, step.params, outline, plugin)


@contextmanager
def blaming(step: str) -> Iterator[None]:
    """Name the step whose transformation failed.

    Raises:
        InputError: a file cannot be read.
        ResourceError: memory is short, or a disk is full.
        PluginError: anything else that is not an error of ours.
    """
    try:
        yield
    except RegraftError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError("the disk is full", where=f"step {step}", found=error.filename,
                                remedy="free some space; the output's disk and the one for temporary files are used",
                                ) from error  # fmt: skip
        if error.filename is None:
            raise _failed(step, error) from error
        raise unreadable(f"step {step}: {error.filename}", error) from error
    except Exception as error:
        where, text = f"step {step}", str(error)
        if isinstance(error, MemoryError) or "out of memory" in text:
            raise ResourceError(
                "not enough memory for the step",
                where=where,
                found=text.splitlines()[0] if text else None,
                remedy="use another --device, or a machine with more memory",
            ) from error
        raise _failed(step, error) from error


def _failed(step: str, error: Exception) -> PluginError:
    return PluginError(
        f"the transformation failed: {type(error).__name__}: {error}",
        where=f"step {step}",
        remedy="run again with --traceback and report it to the plugin's author",
    )


def paths_of(params: BaseModel) -> Iterator[tuple[str, Path]]:
    """Every path that a step reads, with its key, such as `corpora[1]`; of data and models only what is no hub id.

    A pattern stands for the files that `core.file_patterns.matched` finds.
    """
    yield from _paths(params, "")


def _paths(value: Any, key: str) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, DataSettings):
        paths = [path for source in value.sources if (path := Path(source)).exists() or matched(path)]
        yield from _paths(paths, f"{key}.source")
    elif isinstance(value, BaseModel):
        outputs, references = _keys_of(value, "output-path"), _keys_of(value, "data", "model")
        items = {name: _as_path(item) if name in references else item for name, item in value if name not in outputs}
        yield from _paths(items, key)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _paths(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _paths(item, f"{key}[{index}]")


def _as_path(reference: Any) -> Any:
    """A data set or a model on this machine as its path; a hub id and anything else as it is."""
    if not isinstance(reference, str):
        return reference
    path = Path(reference).expanduser()
    return path if path.exists() or matched(path) else reference


def outputs_of(params: BaseModel) -> Iterator[tuple[str, Path]]:
    """Every path that a step writes beside the output, such as a log, with its key."""
    keys = _keys_of(params, "output-path")
    yield from ((name, value) for name, value in params if name in keys and value is not None)
    for name, value in params:
        if isinstance(value, BaseModel):
            yield from ((f"{name}.{key}", path) for key, path in outputs_of(value))


def _keys_of(params: BaseModel, *formats: str) -> set[str]:
    """The keys whose values are references of these formats."""
    shape = shape_of(type(params))
    return {name for name, _ in params for node in shape.at((name,), {}) if node.get("format") in formats}


@dataclass(frozen=True)
class Finished:
    """The output after what `[output]` asks for.

    Args:
        checkpoint: as it is written.
        notes: what was done.
        realised: told, while it is written, what becomes of changes of quantised weights.
    """

    checkpoint: Checkpoint
    notes: tuple[str, ...] = ()
    realised: Realised = field(default_factory=Realised)


def output_of(recipe: Recipe, base: Checkpoint, checkpoint: Checkpoint, host: Host) -> Finished:
    """What `[output]` makes of the checkpoint after the last step, and what it has to say.

    Raises:
        Unsupported: it cannot be written in that form.
    """
    if recipe.writes_adapter:
        adapter, notes = adapter_of(base, checkpoint, dtype=recipe.output.dtype, families=host.architectures())
        return Finished(adapter, tuple(notes))
    uncast = checkpoint = overlay(checkpoint, _card_patch(checkpoint), by="output")
    if recipe.output.dtype != "keep":
        checkpoint = overlay(uncast, cast_patch(uncast, recipe.output.dtype), by="output.dtype")
    return _quantised(recipe.output.quantize, base, uncast, checkpoint, host)


def _quantised(
    method: Literal["keep", "none", "nf4", "int8"], base: Checkpoint, uncast: Checkpoint, checkpoint: Checkpoint,
    host: Host,
) -> Finished:  # fmt: skip
    if method == "none" or (method == "keep" and base.packed is None):
        return Finished(checkpoint)
    from regraft.core.repack import gauges_of, repack

    if method == "keep":
        repacked = repack(base, checkpoint, uncast)
        return Finished(repacked.checkpoint, (repacked.note,), repacked.realised)
    from regraft.core.architectures import architecture_of
    from regraft.core.quantize import quantize_patch

    realised = gauges_of(base, uncast, method)
    architecture = architecture_of(checkpoint.config, checkpoint.specs, host.architectures())
    patch = quantize_patch(checkpoint, method, architecture, realised.gauges)
    return Finished(overlay(checkpoint, patch, by="output.quantize"), patch.notes, realised)


def layout_of(recipe: Recipe, output: Checkpoint) -> Layout:
    """The weight files of the output."""
    return lay_out_adapter(output) if recipe.writes_adapter else lay_out(output, recipe.output.shard_size)


def changes_of(recipe: Recipe, base: Checkpoint, output: Checkpoint) -> dict[str, tuple[str, ...]]:
    """As `compare`; an adapter, which stands beside the base, only adds."""
    if recipe.writes_adapter:
        return {"copied": (), "rewritten": (), "added": tuple(output.tensors), "dropped": ()}
    return compare(stored_base(base, output), output)


def stored_base(base: Checkpoint, result: Checkpoint) -> Checkpoint:
    """The base as the output can have copied it: if that is quantised, with quantised weights as they are stored."""
    quantised = "quantization_config" in result.config
    return base.packed if base.packed is not None and quantised else base


def _card_patch(checkpoint: Checkpoint) -> Patch:
    """The base's card stands beside the output's own, unless the base was written by regraft."""
    card = checkpoint.files.get(CARD)
    if card is None:
        return Patch()
    if LOCK in checkpoint.left_behind:
        return Patch(dropped={CARD: "describes the base; the output gets its own"})
    return Patch(files={BASE_CARD: card}, dropped={CARD: f"the output gets its own; kept as {BASE_CARD}"})


def memory_bound(checkpoint: Checkpoint, threads: int) -> int:
    """Bytes of host memory that writing `checkpoint` needs at its peak: see DESIGN §8.

    Every worker has a handful of chunks (input, fp32 copies, output); operands are held while a tensor is written; a
    tensor that is computed whole needs its inputs, fp32 copies and output at once, one such tensor at a time.
    """
    computed = [tensor for tensor in checkpoint.tensors.values() if tensor.raw is None]
    if not computed:
        return _INTERPRETER_RSS_BYTES + threads * 2 * CHUNK_BYTES
    local = sorted((_local_bytes(tensor) for tensor in computed if tensor.row_local), reverse=True)[:threads]
    whole = max((_whole_bytes(tensor) for tensor in computed if not tensor.row_local), default=0)
    return TORCH_RSS_BYTES + (64 << 20) + sum(local) + whole


def memory_beside_torch(plan: Plan) -> int:
    """The part of `plan.memory_bytes` that is not the interpreter with torch loaded."""
    return plan.memory_bytes - (TORCH_RSS_BYTES if plan.computes else 0)


def _local_bytes(tensor: LazyTensor) -> int:
    return 6 * max(CHUNK_BYTES, tensor.spec.row_bytes) + tensor.held_bytes


def _whole_bytes(tensor: LazyTensor) -> int:
    largest = max([tensor.spec.nbytes, *(leaf.spec.nbytes for leaf in leaves(tensor).values())])
    return 5 * largest + tensor.held_bytes


def compare(before: Checkpoint, after: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Tensor names by what happens to them: copied, rewritten, added, dropped. A rename is copied."""
    changes: dict[str, list[str]] = {"copied": [], "rewritten": [], "added": [], "dropped": []}
    stored = {place_of(tensor) for tensor in before.tensors.values()} - {None}
    for name, tensor in after.tensors.items():
        moved = tensor.raw is not None and place_of(tensor) in stored
        kind = "copied" if moved else "rewritten" if name in before.tensors else "added"
        changes[kind].append(name)
    kept = {place_of(tensor) for tensor in after.tensors.values()}
    for name, tensor in before.tensors.items():
        if name not in after.tensors and (tensor.raw is None or place_of(tensor) not in kept):
            changes["dropped"].append(name)
    return {kind: tuple(names) for kind, names in changes.items()}


def place_of(tensor: LazyTensor) -> tuple[Path, int] | None:
    """Where the bytes of a tensor stand, if they stand anywhere."""
    raw = tensor.raw
    return None if raw is None else (raw.path, raw.offset)
