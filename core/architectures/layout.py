"""A family's parts as one checkpoint stores them: names, shapes, rows, ties."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from regraft.core.architectures.family import Family, Part, Settings, Size
from regraft.core.architectures.slot import Slot, consecutive, grouped
from regraft.core.errors import InputError, PluginError

OUTSIDE = -1
"""Stands for the layer of a part that is in none."""

EMBEDDINGS = ("embed_tokens", "lm_head")


_OTHER_HEADS = ("ForTokenClassification", "ForSequenceClassification", "ForQuestionAnswering")


@dataclass(frozen=True)
class Layout:
    """How one checkpoint stores the parts of its family.

    Args:
        family: the row of the table that describes it.
        settings: config.json under llama's names, defaults filled in.
        prefix: what stands before base-model paths in this checkpoint: `model.`, or nothing in a base model's.
        stored: names of the tensors in the checkpoint; empty if only the config is known.
    """

    family: Family
    settings: Settings = field(repr=False)
    prefix: str
    stored: frozenset[str] = field(repr=False, default=frozenset())

    @property
    def tied(self) -> bool:
        """Whether the config says that the head is the embeddings."""
        return bool(self.settings.get("tie_word_embeddings"))

    @cached_property
    def headless(self) -> bool:
        """Whether there is no head over the vocabulary: a base model's checkpoint, or a classifier's."""
        if not self.stored or self.tied or (self.prefix and not self._classifies):
            return False
        return not any(self.name(part) in self.stored for part in self.parts_of("lm_head"))

    @property
    def _classifies(self) -> bool:
        """Whether the config names a class with another head, such as LlamaForSequenceClassification."""
        names = self.settings.get("architectures")
        return isinstance(names, list) and any(str(name).endswith(_OTHER_HEADS) for name in names)

    def size(self, size: Size) -> int:
        """A size of the family as a number.

        Raises:
            InputError: the config gives no whole number for it.
            PluginError: the family never defines it.
        """
        value = self.settings.get(size) if isinstance(size, str) else size
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if size not in self.settings:
            raise PluginError(
                "the family names a size that it does not define",
                where=self.family.label,
                found=size,
                remedy="add it to the family's defaults",
            )
        raise InputError(
            "is missing or no whole number",
            where=f"config.json: {size}",
            expected="a whole number",
            found=repr(value),
            remedy="correct config.json",
        )

    def parts_of(self, role: str) -> list[Part]:
        """Parts that hold `role`, in any layer."""
        return [part for part in self.family.parts if role in part.role_names()]

    def present(self, layer: int) -> Iterator[Part]:
        """Parts of `layer`, or those outside the layers."""
        for part in self.family.parts:
            if part.per_layer == (layer != OUTSIDE) and (part.when is None or part.when(self.settings, layer)):
                yield part

    def name(self, part: Part, layer: int = OUTSIDE, expert: int | None = None) -> str:
        """Name of the part's weight in the checkpoint, or what transformers would write if it is not there.

        Tied embeddings and head share one name: that of the embeddings, or of the head where only that is stored. If
        both are stored each keeps its own, as the stock loader does.
        """
        own = self._own_name(part, layer, expert)
        if not self.tied or own in self.stored or not set(EMBEDDINGS) & set(part.role_names()):
            return own
        pair = [self._own_name(twin, OUTSIDE, None) for role in EMBEDDINGS for twin in self.parts_of(role)]
        return next((name for name in pair if name in self.stored), pair[0])

    def module(self, part: Part, layer: int) -> str | None:
        """Path in the stock class; None for one of many experts, which the class stacks."""
        if part.per_expert:
            return None
        path = part.path.format(layer=layer)
        return path if part.outside or not self.family.base else f"{self.family.base}.{path}"

    def shape(self, part: Part) -> tuple[int, ...]:
        """The stored shape that the config implies."""
        rows = self.rows(part)
        if part.columns is None:
            return (rows,)
        columns = self.size(part.columns)
        stack = () if part.experts is None else (self.size(part.experts),)
        return (*stack, columns, rows) if part.transposed else (*stack, rows, columns)

    def rows(self, part: Part) -> int:
        """Output rows of all the part's roles together."""
        return sum(self.size(size) for _, size in part.roles)

    def has_bias(self, part: Part) -> bool:
        """Whether the config gives the part a bias."""
        return bool(self.settings.get(part.bias)) if isinstance(part.bias, str) else part.bias

    def specs(self, part: Part, layer: int, num_experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the part's weights and biases in `layer`."""
        for expert in range(num_experts) if part.per_expert else (None,):
            name = self.name(part, layer, expert)
            yield name, self.shape(part)
            if self.has_bias(part):
                yield bias_name(name), (self.rows(part),)

    def slot(self, part: Part, layer: int, expert: int | None, role: str | None = None) -> Slot:
        """The place of one role of the part, or of the whole part."""
        runs = dict(zip(part.role_names(), self._runs(part), strict=True))
        name = self.name(part, layer, expert)
        return Slot(
            role=role or "+".join(part.role_names()),
            tensor=name,
            shape=self.shape(part),
            rows=runs[role] if role else (slice(0, self.rows(part)),),
            bias=bias_name(name) if self.has_bias(part) else None,
            bias_switch=part.bias if isinstance(part.bias, str) else None,
            transposed=part.transposed,
            tied=self._shared(part),
            expert=expert if part.experts is not None else None,
            module=self.module(part, layer),
        )

    def _own_name(self, part: Part, layer: int, expert: int | None) -> str:
        prefix = "" if part.outside else self.prefix
        suffix = "" if part.parameter else ".weight"
        paths = [path.format(layer=layer, expert=expert) for path in (*part.stored, part.path)]
        names = [f"{prefix}{path}{suffix}" for path in paths]
        return next((name for name in names if name in self.stored), names[0])

    def _shared(self, part: Part) -> bool:
        if not self.tied or not set(EMBEDDINGS) & set(part.role_names()):
            return False
        return len({self.name(twin) for role in EMBEDDINGS for twin in self.parts_of(role)}) == 1

    def _runs(self, part: Part) -> list[tuple[slice, ...]]:
        if part.interleaved:
            counts = ("num_attention_heads", "num_key_value_heads", "head_dim")
            return grouped(*(self.size(count) for count in counts))
        return consecutive(self.size(size) for _, size in part.roles)


def bias_name(weight: str) -> str:
    """Name of the bias beside a weight."""
    return f"{weight.removesuffix('.weight')}.bias"
