"""An adapter as the output: what the steps add to the base's weights, in PEFT's form, beside an untouched base.

A weight W [d_out, d_in] that becomes W + s·(L @ R) gives its module lora_B = L [d_out, r], lora_A = R [r, d_in] and
lora_alpha = s·r. Several steps on one weight stack their ranks: A = [R1; R2], B = [s1·L1, s2·L2]. Layers stored as
(in, out), such as GPT-2's, and embeddings take the factors turned. Anything but low-rank deltas is refused by name.

`[output] format` decides whether one is written, or where it says nothing a step that asks for it. Sizes and config are
known at plan time, because outlines tell the shapes and scales of the deltas.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regraft.core.architectures import Architecture, Family, Slot, architecture_of
from regraft.core.checkpoint import ADAPTER_CONFIG, Checkpoint, FileRef
from regraft.core.errors import TransformationError, Unsupported, UsageError
from regraft.core.jsonio import dump
from regraft.core.layout import Layout, Shard
from regraft.core.low_rank import LowRankDelta
from regraft.core.operations import ComputedTensor
from regraft.core.patch import Outline
from regraft.core.specs import CODE_OF_NAME, TensorSpec
from regraft.core.tensors import LazyTensor, RowReader

if TYPE_CHECKING:
    import torch

    from regraft.core.recipe.model import Recipe

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

_EMBEDDINGS = ("embed_tokens", "position_embeddings")
_KEPT = ("F32", "F16", "BF16")
_REMEDY = 'set [output] format = "checkpoint", which writes the whole model'


@dataclass(frozen=True)
class Adapted:
    """One module of the base with the deltas of its weight, those of the first step first."""

    slot: Slot
    deltas: tuple[LowRankDelta, ...]

    @property
    def module(self) -> str:
        """Path in the stock class."""
        return str(self.slot.module)

    @property
    def embedding(self) -> bool:
        """Whether the module looks rows up, which PEFT adapts under names of their own."""
        return self.slot.role in _EMBEDDINGS

    @property
    def turned(self) -> bool:
        """Whether the weight is stored as (in, out), so that left and right change places."""
        return self.slot.transposed or self.embedding

    @property
    def rank(self) -> int:
        """The ranks of all deltas together."""
        return sum(delta.right.spec.shape[0] for delta in self.deltas)

    @property
    def scale(self) -> float:
        """What PEFT is to multiply B·A with: 1 where the deltas have scales of their own, which are then in B."""
        scales = {delta.scale for delta in self.deltas}
        return scales.pop() if len(scales) == 1 else 1.0

    @property
    def alpha(self) -> float:
        """`lora_alpha`: the number whose quotient by the rank is the scale, to the bit where there is one."""
        alpha = self.scale * self.rank
        near = (alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf))
        exact = next((number for number in near if number / self.rank == self.scale), alpha)
        return int(exact) if exact.is_integer() else exact

    def tensors(self, dtype: str) -> list[LazyTensor]:
        """A and B under the names that PEFT gives them; `dtype` as `[output] dtype`."""
        names = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A.weight", "lora_B.weight")
        lefts, rights = [delta.left for delta in self.deltas], [delta.right for delta in self.deltas]
        inner, outer = (lefts, rights) if self.turned else (rights, lefts)
        folded = [delta.scale / self.scale if self.scale else 1.0 for delta in self.deltas]
        stored = _stored_dtype([*inner, *outer], dtype, exact=all(scale == 1.0 for scale in folded))
        stem = f"{PREFIX}{self.module}"
        return [
            Factor(f"{stem}.{names[0]}", stored, inner, axis=0, turned=self.turned),
            Factor(f"{stem}.{names[1]}", stored, outer, axis=1, turned=self.turned, scales=folded),
        ]


def _stored_dtype(tensors: Iterable[LazyTensor], wanted: str, *, exact: bool) -> str:
    """The dtype that all factors of a module have, or the one asked for; fp32 where they differ or are multiplied."""
    if wanted != "keep":
        return CODE_OF_NAME[wanted]
    found = {tensor.spec.dtype for tensor in tensors}
    return found.pop() if exact and len(found) == 1 and found <= set(_KEPT) else "F32"


class Factor(LazyTensor):
    """Factors of several deltas joined: A [rank, in] along its first axis, B [out, rank] along its second.

    Args:
        name, dtype: of the spec.
        parts: the factors.
        axis: along which they are joined.
        turned: whether each is transposed first.
        scales: what each is multiplied with, in fp32; 1 leaves it.
    """

    def __init__(
        self, name: str, dtype: str, parts: Sequence[LazyTensor], *, axis: int, turned: bool,
        scales: Sequence[float] = (),
    ) -> None:  # fmt: skip
        shapes = [part.spec.shape[::-1] if turned else part.spec.shape for part in parts]
        joined = sum(shape[axis] for shape in shapes)
        self.spec = TensorSpec(name, dtype, (joined, shapes[0][1]) if axis == 0 else (shapes[0][0], joined))
        self.parts = tuple(parts)
        self._axis, self._turned = axis, turned
        self._scales = tuple(scales) or (1.0,) * len(self.parts)

    @property
    def row_local(self) -> bool:
        """Factors are small, and read whole."""
        return False

    @property
    def held_bytes(self) -> int:
        """The parts, joined and in fp32."""
        return sum(part.held_bytes for part in self.parts) + 12 * self.spec.numel

    def open(self, device: str = "cpu") -> RowReader:
        """Join the parts.

        Raises:
            TransformationError: a factor is not finite, or not in the dtype it is to be stored in.
        """
        import torch

        from regraft.core.specs import torch_dtype

        parts = [self._part(part, scale, device) for part, scale in zip(self.parts, self._scales, strict=True)]
        joined = torch.cat(parts, dim=self._axis).to(torch_dtype(self.spec.dtype)).contiguous()
        if not bool(joined.isfinite().all()):
            raise TransformationError("a factor of the adapter is not finite", where=self.spec.name,
                                      expected=f"finite numbers of {self.spec.dtype}",
                                      remedy="use a wider [output] dtype, or correct the parameters")  # fmt: skip
        return lambda start, stop: joined[start:stop]

    def _part(self, part: LazyTensor, scale: float, device: str) -> torch.Tensor:
        values = part.load(device)
        values = values.T if self._turned else values
        return values.float() if scale == 1.0 else values.float() * scale


def formed(recipe: Recipe, base: Checkpoint, outlines: Mapping[str, Outline]) -> tuple[Recipe, list[str]]:
    """The recipe with the form of its output decided, and what the plan has to say of that.

    `[output] format` counts. Where it is not given the steps' own wishes do, and without any a checkpoint is written.

    Args:
        recipe: what is asked.
        base: what an adapter would stand beside.
        outlines: what each step promises, by its id.

    Raises:
        UsageError: steps ask for different forms, or a key of `[output]` is for the other one.
        Unsupported: as `check_steps`.
    """
    wishes = {step: outline.form for step, outline in outlines.items() if outline.form is not None}
    form, notes, wisher = recipe.output.format, list[str](), ""
    if form is None and len(set(wishes.values())) > 1:
        raise UsageError(
            "the steps ask for different outputs", where="[output] format", expected='"checkpoint" or "adapter"',
            found=", ".join(f"{step}: {wish}" for step, wish in wishes.items()),
            remedy="say in [output] which it shall be, or the same in all steps",
        )  # fmt: skip
    if form is None and wishes:
        wisher, form = next(iter(wishes.items()))
        other = "checkpoint" if form == "adapter" else "adapter"
        notes.append(f'step {wisher} asks for this form, {form}; [output] format = "{other}" asks for the other')
    recipe = recipe.with_format(form or "checkpoint")
    if recipe.writes_adapter:
        if key := recipe.output.checkpoint_key:
            raise UsageError(f"{key} is for whole checkpoints, and step {wisher} asks for an adapter",
                             where=f"[output] {key}", remedy=f"leave it out, or {_REMEDY}")  # fmt: skip
        check_steps(base, outlines, wisher)
    return recipe, notes


def check_steps(base: Checkpoint, outlines: Mapping[str, Outline], wisher: str = "") -> None:
    """Refuse a recipe whose steps do anything that an adapter cannot hold.

    Args:
        base: what the adapter will stand beside.
        outlines: what each step promises, by its id.
        wisher: the step that asks for the adapter; "" if the recipe does.

    Raises:
        Unsupported: naming the step and the first thing that it changes.
    """
    passing = _passing(base, outlines)
    asked = f"step {wisher} asks for an adapter: {_REMEDY}" if wisher else _REMEDY
    for step, outline in outlines.items():
        faults = [(f"step {step}: {where}", what, asked) for where, what in _beyond(base, outline, passing)]
        if outline.beyond_adapter is not None:
            faults = [(f"step {step}", *outline.beyond_adapter)]
        for where, what, remedy in faults:
            raise Unsupported(
                "an adapter cannot hold this change", where=where,
                expected="low-rank deltas of weights of the base, rounded to nearest, and nothing else", found=what,
                remedy=remedy,
            )  # fmt: skip


def _passing(base: Checkpoint, outlines: Mapping[str, Outline]) -> set[str]:
    """Files that one step writes for another, which leaves them behind: the base and the result have none of them."""
    written: set[str] = set()
    there: set[str] = set()
    for outline in outlines.values():
        there |= {*outline.files, *outline.json}
        written |= there
        there -= set(outline.dropped)
    return written - there - set(base.files)


def _beyond(base: Checkpoint, outline: Outline, passing: Set[str]) -> Iterable[tuple[str, str]]:
    """What of a step is no low-rank delta: a place, and what happens there."""
    for name, spec in outline.specs.items():
        if name not in base.specs:
            yield name, "a tensor is added"
        elif name not in outline.deltas:
            yield name, "the tensor is rewritten"
        elif spec != base.specs[name]:
            yield name, f"the tensor becomes {spec}"
    yield from ((name, "the tensor is removed") for name in sorted(outline.removals))
    yield from ((name, f"the tensor {old} is renamed") for name, old in outline.renames.items())
    for name, change in outline.json.items():
        if name not in passing:
            yield name, f"{', '.join(change) or 'nothing'} is changed"
    yield from ((name, "the file is written") for name in outline.files if name not in passing)
    # of folders inside a model's, transformers reads none
    left = (name for name in outline.dropped if name not in passing and "/" not in name)
    yield from ((name, "the file is left behind") for name in left)


def adapter_of(
    base: Checkpoint, result: Checkpoint, *, dtype: str, families: Sequence[Family] = ()
) -> tuple[Checkpoint, list[str]]:
    """The adapter that makes `result` of `base`, as a checkpoint of its factors, and notes for the user.

    Args:
        base: what it will stand beside.
        result: the base after steps that `check_steps` has passed.
        dtype: of the factors, as `[output] dtype`.
        families: rows of plugins for `architecture_of`.

    Raises:
        Unsupported: a changed weight is none that PEFT can adapt alone, or nothing changes.
    """
    changed = _deltas(base, result)
    if not changed:
        raise Unsupported("there is nothing to write an adapter of: no step changes a weight", where="[output] format",
                          remedy="add a step, such as lora-merge")  # fmt: skip
    architecture = architecture_of(base.config, base.specs, families)
    adapted = [Adapted(_slot(architecture, base, name), deltas) for name, deltas in changed.items()]
    tensors = {part.spec.name: part for module in adapted for part in module.tensors(dtype)}
    files = {ADAPTER_CONFIG: FileRef(data=dump(_config(adapted, base)))}
    return Checkpoint(result.label, tensors, files, origin=base.origin), _notes(adapted, base)


def _deltas(base: Checkpoint, result: Checkpoint) -> dict[str, tuple[LowRankDelta, ...]]:
    changed = {}
    for name, tensor in result.tensors.items():
        deltas: list[LowRankDelta] = []
        while tensor is not base.tensors[name]:
            assert isinstance(tensor, ComputedTensor)  # by check_steps
            assert isinstance(tensor.operation, LowRankDelta)
            deltas.insert(0, tensor.operation)
            tensor = tensor.sources[0]
        if deltas:
            changed[name] = tuple(deltas)
    return changed


def _slot(architecture: Architecture, base: Checkpoint, name: str) -> Slot:
    """The module whose whole weight is `name`."""
    slot, where = architecture.modules.get(name), f"{base.label}: {name}"
    if slot is None:
        raise Unsupported("PEFT cannot adapt this tensor alone: the stock class has no module for it", where=where,
                          expected="a linear layer or an embedding", remedy=_REMEDY)  # fmt: skip
    if slot.tied:
        raise Unsupported("embeddings and head are one matrix, of which PEFT would adapt one side", where=where,
                          remedy=_REMEDY)  # fmt: skip
    return slot


def _config(adapted: Sequence[Adapted], base: Checkpoint) -> dict[str, Any]:
    """adapter_config.json. The commonest rank and alpha are everybody's; patterns name the modules that have others."""
    rank = _commonest(module.rank for module in adapted)
    alpha = _commonest(module.alpha for module in adapted)
    hub = base.origin.get("source") == "hub"
    return {
        "alpha_pattern": {f"^{module.module}": module.alpha for module in adapted if module.alpha != alpha},
        "base_model_name_or_path": base.origin["repo"] if hub else None,
        "bias": "none",
        "fan_in_fan_out": any(module.slot.transposed for module in adapted),
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {f"^{module.module}": module.rank for module in adapted if module.rank != rank},
        "revision": base.origin["commit"] if hub else None,
        "target_modules": sorted(module.module for module in adapted),
        "task_type": "CAUSAL_LM",
    }


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _notes(adapted: Sequence[Adapted], base: Checkpoint) -> list[str]:
    ranks = ", ".join(map(str, sorted({module.rank for module in adapted})))
    notes = [f"a PEFT adapter of {len(adapted)} modules (rank {ranks}); the base stays as it is"]
    summed = sum(len(module.deltas) > 1 for module in adapted)
    if summed:
        notes.append(f"{summed} modules hold the deltas of several steps, which a checkpoint would round one by one")
    if base.origin.get("source") != "hub":
        notes.append("the base is no model of the hub, so the adapter does not name it: load it first")
    return notes


def lay_out_adapter(adapter: Checkpoint) -> Layout:
    """One file, under PEFT's name."""
    return Layout((Shard(ADAPTER_WEIGHTS, tuple(adapter.tensors.values())),))
