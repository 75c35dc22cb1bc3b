"""From the adapter's tensors to the tensors of the base that they change, with every misfit in one error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from regraft.core.architectures import Slot
from regraft.core.errors import InputError
from regraft.core.low_rank import LowRankDelta, Transposed
from regraft.core.operations import Operation
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor
from regraft.plugins.lora_merge.adapter import Adapter, Module
from regraft.plugins.lora_merge.base import BaseModel, Place
from regraft.plugins.lora_merge.operations import AddScaled, MagnitudeDelta, StackedDelta, Window

STACKED = ("gate_up_proj", "down_proj")
"""Parameters that stock mixtures stack over their experts, in the order in which their modules define them."""

_SHOWN = 3


@dataclass(frozen=True)
class Misfit:
    """Tensors of the adapter that have no place in the base, what was expected, and the name that was looked for."""

    specs: tuple[TensorSpec, ...]
    expected: str
    wanted: str = ""


@dataclass
class Target:
    """What happens to one tensor.

    Args:
        place: where it stands.
        start: what the adapter brings in its place; None starts from the base.
        delta: what is then done to it, with `place.source` as its input; None leaves it.
        frozen: whether `start` is the weight as it was before the adapter's training.
    """

    place: Place
    start: LazyTensor | None = None
    delta: Operation | None = None
    frozen: bool = False


@dataclass
class Targets:
    """Every tensor that the adapter changes.

    Args:
        adapter: the adapter.
        base: the model it is merged into.
        scale: multiplies every delta.
        seed_for: the seed by which a tensor is rounded stochastically; None rounds to nearest.
    """

    adapter: Adapter
    base: BaseModel
    scale: float
    seed_for: Callable[[str], int] | None = None
    by_tensor: dict[str, Target] = field(default_factory=dict)
    vocabulary: int | None = None
    ranks: set[int] = field(default_factory=set)
    unused_copies: list[str] = field(default_factory=list)
    _misfits: list[Misfit] = field(default_factory=list)

    def collect(self) -> None:
        """Find the place of every tensor of the adapter.

        Raises:
            InputError: tensors without a place, or of another shape than theirs.
        """
        for name, tensor in self.adapter.parameters.items():
            self._replace(name, tensor)
        for module in self.adapter.modules:
            self._adapt(module)
        self._check_vocabulary()
        if self._misfits:
            raise self._misfit_error()

    def _replace(self, name: str, tensor: LazyTensor) -> None:
        place = self.base.parameter(name)
        if place is None:
            self._misfit([tensor.spec], f"a parameter {name} in the base", name)
            return
        shape, expected = tensor.spec.shape, self.base.spec(place).shape
        resized = place.tensor in (self.base.embeddings, self.base.head) and shape[1:] == expected[1:]
        if shape != expected and not resized:
            self._misfit([tensor.spec], f"{list(expected)} for {place.source}")
        elif shape == expected and name in self.adapter.copies:
            self.unused_copies.append(place.tensor)
        elif place.tensor in self.by_tensor:
            self._misfit([tensor.spec], f"one tensor of the adapter for {place.tensor}, not two")
        else:
            self.by_tensor[place.tensor] = Target(place, start=tensor, frozen=name in self.adapter.copies)

    def _adapt(self, module: Module) -> None:
        if stacked := self._stacked(module):
            self._adapt_experts(module, *stacked)
            return
        place = self.base.place(module.path)
        if place is None:
            self._misfit(module.specs(), f"a matrix for {module.path} in the base", f"{module.path}.weight")
            return
        if len(self.base.specs[place.source].shape) != 2:
            self._misfit(module.specs(), f"a matrix, which {self.base.specs[place.source]} is not")
            return
        target = self.by_tensor.setdefault(place.tensor, Target(place))
        if target.delta is not None:
            self._misfit(module.specs(), f"one module of the adapter for {place.tensor}, not two")
            return
        shape = (target.start.spec if target.start is not None else self.base.spec(place)).shape
        target.delta = self._delta(module, place, (shape[0], shape[1]))
        if "lora_B.bias" in module.tensors:
            self._adapt_bias(module, place)

    def _delta(self, module: Module, place: Place, shape: tuple[int, int]) -> Operation | None:
        """The change of a weight, or None if the factors do not fit it; `shape` is the stored one."""
        settings = self.adapter.settings
        embedding = any("embedding" in role for role in module.tensors)
        path = f"{module.path}.weight" if self._by_parameter(f"{module.path}.weight") else module.path
        rank, scale = settings.rank_of(path), settings.scale_of(path) * self.scale
        turned = embedding or place.transposed
        inputs, outputs = (shape[0], shape[1]) if turned else (shape[1], shape[0])
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        expected: dict[str, tuple[int, ...]] = {names[0]: (rank, inputs), names[1]: (outputs, rank)}
        if settings.dora:
            expected["lora_magnitude_vector"] = (outputs,)
        if "lora_B.bias" in module.tensors:
            expected["lora_B.bias"] = (outputs,)
        if not self._fits(module, expected, f"{place.source} {list(shape)}"):
            return None
        self.ranks.add(rank)
        first, second = (module.tensors[name] for name in names)
        left, right = (Transposed(first), Transposed(second)) if turned else (second, first)
        if settings.dora:
            magnitude = module.tensors["lora_magnitude_vector"]
            return MagnitudeDelta(place.source, left, right, magnitude, scale, turned, self._seed(place.tensor))
        return LowRankDelta(place.source, left, right, scale, self._seed(place.tensor))

    def _seed(self, tensor: str) -> int | None:
        return None if self.seed_for is None else self.seed_for(tensor)

    def _adapt_bias(self, module: Module, place: Place) -> None:
        vector = module.tensors["lora_B.bias"]
        if place.bias is None:
            self._misfit([vector.spec], f"a bias of {module.path} in the base, to which the adapter's can be added")
            return
        target = self.by_tensor.setdefault(place.bias, Target(Place(place.bias, place.bias)))
        target.delta = AddScaled(place.bias, vector, self.adapter.settings.scale_of(module.path) * self.scale)

    def _stacked(self, module: Module) -> tuple[str, list[tuple[Slot, ...]]] | None:
        """The stacked parameter that the module's factors belong to, and its slots expert by expert.

        peft wraps the module of the experts once for each parameter, in the order of their definition, so the last
        one's factors stand outermost.
        """
        wrapped = [name for name in STACKED if self._by_parameter(f"{module.path}.{name}")]
        if module.depth >= len(wrapped):
            return None
        path = f"{module.path}.{wrapped[-1 - module.depth]}"
        slots = self.base.experts(path)
        return None if slots is None else (path, slots)

    def _by_parameter(self, path: str) -> bool:
        names = self.adapter.settings.target_parameters
        return any(path == name or path.endswith(f".{name}") for name in names)

    def _adapt_experts(self, module: Module, path: str, experts: Sequence[tuple[Slot, ...]]) -> None:
        settings, count = self.adapter.settings, len(experts)
        rank, scale = settings.rank_of(path), settings.scale_of(path) * self.scale
        outputs, inputs = sum(slot.num_rows for slot in experts[0]), experts[0][0].num_columns or 0
        expected: dict[str, tuple[int, ...]] = {"lora_A": (rank * count, inputs), "lora_B": (outputs, rank * count)}
        if not self._fits(module, expected, f"{count} experts of {path} [{outputs}, {inputs}]"):
            return
        self.ranks.add(rank)
        right, left = module.tensors["lora_A"], module.tensors["lora_B"]
        if experts[0][0].expert is not None:
            tensor = experts[0][0].tensor
            stacked = StackedDelta(tensor, left, right, scale, count, self._seed(tensor))
            self.by_tensor[tensor] = Target(Place(tensor, tensor), delta=stacked)
            return
        for expert, slots in enumerate(experts):
            share, row = Window(right, expert * rank, (expert + 1) * rank), 0
            for slot in slots:
                part = Window(left, row, row + slot.num_rows, expert, count)
                place = Place(slot.tensor, slot.tensor)
                delta = LowRankDelta(slot.tensor, part, share, scale, self._seed(slot.tensor))
                self.by_tensor[slot.tensor] = Target(place, delta=delta)
                row += slot.num_rows

    def _fits(self, module: Module, expected: dict[str, tuple[int, ...]], where: str) -> bool:
        wrong = [tensor.spec for role, tensor in module.tensors.items() if tensor.spec.shape != expected.get(role)]
        missing = [role for role in expected if role not in module.tensors]
        wanted = ", ".join(f"{role} {list(shape)}" for role, shape in expected.items())
        if wrong or missing:
            self._misfit(wrong or module.specs(), f"{wanted} for {where}")
        return not wrong and not missing

    def _check_vocabulary(self) -> None:
        """Embeddings and head must agree on a number of rows if the adapter brings another one."""
        rows: dict[str, int] = {}
        brought: list[TensorSpec] = []
        for name in filter(None, dict.fromkeys((self.base.embeddings, self.base.head))):
            target = self.by_tensor.get(name)
            if target is not None and target.start is not None:
                rows[name] = target.start.spec.rows
                brought.append(target.start.spec)
            elif name in self.base.specs and not self.base.tied:
                rows[name] = self.base.specs[name].rows
        if len(set(rows.values())) > 1:
            sizes = " and ".join(f"{name} with {count}" for name, count in rows.items())
            self._misfit(brought, f"embeddings and head of as many rows, not {sizes}")
        elif brought and self.base.embeddings:
            (after,) = set(rows.values())
            self.vocabulary = after if after != self.base.specs[self.base.embeddings].rows else None

    def _misfit(self, specs: Iterable[TensorSpec], expected: str, wanted: str = "") -> None:
        self._misfits.append(Misfit(tuple(specs), expected, wanted))

    def _misfit_error(self) -> InputError:
        first, specs = self._misfits[0], [spec for misfit in self._misfits for spec in misfit.specs]
        more = f"; and {len(specs) - _SHOWN} more" if len(specs) > _SHOWN else ""
        hint = _nearest(first.wanted, self.base.specs) if first.wanted else ""
        maker = self.adapter.settings.base_model
        return InputError(
            f"{len(specs)} of the adapter's {self.adapter.num_tensors} tensors do not fit the base model",
            where=self.adapter.file,
            expected=first.expected + (f" (the nearest is {hint})" if hint else ""),
            found="; ".join(map(str, specs[:_SHOWN])) + more,
            remedy="use the model that the adapter was made for" + (f": {maker}" if maker else ""),
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    """The most similar known name that counts the same layers; empty if none is similar."""
    numbers = re.findall(r"\d+", name)
    same = [other for other in known if re.findall(r"\d+", other) == numbers]
    return next(iter(difflib.get_close_matches(name, same, n=1)), "")
