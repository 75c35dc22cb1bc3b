"""Answers where a role of one checkpoint is stored: from config.json and the tensor names alone, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from regraft.core.architectures.family import Part, Settings
from regraft.core.architectures.layout import OUTSIDE, Layout
from regraft.core.architectures.modules import expert_tensors, slot_of_module
from regraft.core.architectures.slot import Slot
from regraft.core.errors import Unsupported, UsageError

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Architecture:
    """The roles of one model, made by `architecture_of`.

    Args:
        layout: the family's parts as this checkpoint stores them.
        extra_specs: shapes of tensors that belong to the model but to no known role.
    """

    layout: Layout
    extra_specs: Mapping[str, tuple[int, ...]] = field(repr=False, default_factory=dict)

    @property
    def family(self) -> str:
        """Name of the family, such as `gemma3`."""
        return self.layout.family.label

    @property
    def model_type(self) -> str:
        """The `model_type` of config.json."""
        return self.layout.family.model_type

    @property
    def settings(self) -> Settings:
        """config.json under llama's names, with the stock class's defaults filled in."""
        return self.layout.settings

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.layout.size("num_hidden_layers")

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.layout.size("hidden_size")

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return self.layout.size("num_attention_heads")

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of a layer."""
        return self.layout.size("num_key_value_heads")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.layout.size("head_dim")

    @property
    def intermediate_size(self) -> int:
        """Width of a dense MLP between its projections; experts may have another."""
        return self.layout.size("intermediate_size")

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings that the config implies."""
        return self.layout.size("vocab_size")

    @property
    def num_experts(self) -> int:
        """Experts of a sparse layer; 0 in a dense model."""
        return self.layout.size("num_local_experts") if self.layout.parts_of("router") else 0

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the config says that the head is the embeddings."""
        return self.layout.tied

    @property
    def headless(self) -> bool:
        """Whether this is a base model's checkpoint, with no output head at all."""
        return self.layout.headless

    @property
    def norm_offset(self) -> float | None:
        """What norms add to their stored weight: 1 in Gemma, else 0; None if unknown."""
        return self.layout.family.norm_offset

    @cached_property
    def qk_norm(self) -> str | None:
        """`head` if queries and keys are normed head by head, `full` if over all heads at once, None if not."""
        if not self.has("q_norm", 0):
            return None
        return "head" if self.slot("q_norm", 0).num_rows == self.head_dim else "full"

    def roles(self, layer: int | None = None) -> tuple[str, ...]:
        """Roles of `layer`, or those outside the layers."""
        number = OUTSIDE if layer is None else self._checked(layer)
        names = dict.fromkeys(role for part in self.layout.present(number) for role in part.role_names())
        return tuple(role for role in names if not (role == "lm_head" and self.headless))

    def has(self, role: str, layer: int | None = None) -> bool:
        """Whether `layer` has this role; without `layer`, whether the model has it anywhere."""
        layers = (None, *range(self.num_layers)) if layer is None else (layer,)
        return any(role in self.roles(number) for number in layers)

    def slot(self, role: str, layer: int | None = None, expert: int | None = None) -> Slot:
        """Where `role` of `layer` is stored.

        Args:
            role: such as `q_proj`; `roles` lists them.
            layer: **required** for a role of the layers.
            expert: **required** for a projection of an expert.

        Raises:
            Unsupported: this model has no such role there, or it is not known where.
            UsageError: the layer or the expert does not exist, or is not given where it must be.
        """
        part = self._part(role, layer)
        place = f"{role} of layer {layer}"
        if part.per_expert or part.experts is not None:
            if expert is None:
                raise UsageError(
                    "every expert has its own",
                    where=place,
                    expected=f"an expert, 0 to {self.num_experts - 1}",
                    remedy="name the expert",
                )
            _checked_index(expert, self.num_experts, "expert")
        elif expert is not None:
            raise UsageError(
                "there are no experts here", where=place, found=f"expert {expert}", remedy="ask without an expert"
            )
        return self.layout.slot(part, OUTSIDE if layer is None else layer, expert, role)

    def rows_of(self, role: str, layer: int | None = None, expert: int | None = None) -> list[int]:
        """Output rows of the stored tensor that belong to `role`, in the role's own order. Raises like `slot`."""
        return self.slot(role, layer, expert).row_indices()

    def head_rows(self, role: str, layer: int, head: int) -> slice:
        """Output rows of the stored tensor that belong to one head of `q_proj`, `k_proj` or `v_proj`.

        Heads of `k_proj` and `v_proj` count key-value heads. Raises like `slot`; UsageError if there is no such head.
        """
        if role not in QKV:
            raise UsageError(
                "has no heads along its output rows",
                where=role,
                expected=", ".join(QKV),
                remedy="for o_proj, use head_columns",
            )
        slot = self.slot(role, layer)
        count = self.num_heads if role == "q_proj" else self.num_kv_heads
        start = _checked_index(head, count, f"head of {role}") * self.head_dim
        return slot.span(start, start + self.head_dim)

    def head_columns(self, head: int) -> slice:
        """Input features of `o_proj` that come from query head `head`."""
        start = _checked_index(head, self.num_heads, "head") * self.head_dim
        return slice(start, start + self.head_dim)

    def kv_head_of(self, head: int) -> int:
        """The key-value head that query head `head` reads."""
        return _checked_index(head, self.num_heads, "head") // (self.num_heads // self.num_kv_heads)

    def bias_switch(self, role: str) -> str | None:
        """Key of config.json that decides whether `role` has a bias; None if it always or never has one.

        What else the key switches on is the difference of `expected_specs` between the two configs.
        """
        switches = [part.bias for part in self.layout.parts_of(role)]
        return switches[0] if switches and isinstance(switches[0], str) else None

    @cached_property
    def modules(self) -> dict[str, Slot]:
        """The modules of the stock class, by the weight that each holds whole. Stacked experts are in none."""
        layers = (OUTSIDE, *range(self.num_layers))
        parts = [(part, layer) for layer in layers for part in self.layout.present(layer)]
        slots = [
            self.layout.slot(part, layer, None) for part, layer in parts if not (part.per_expert or part.parameter)
        ]
        return {slot.tensor: slot for slot in slots if slot.module is not None}

    def expected_specs(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the config implies, by name, with its shape; a tied head is left out.

        Tensors beside the text model (a vision tower) are not part of it; see `ignores`.
        """
        specs = dict(self.extra_specs)
        for layer in (OUTSIDE, *range(self.num_layers)):
            for part in self.layout.present(layer):
                if not ("lm_head" in part.role_names() and (self.tie_word_embeddings or self.headless)):
                    specs.update(self.layout.specs(part, layer, self.num_experts))
        return specs

    def ignores(self, tensor: str) -> bool:
        """Whether a tensor of this name may stand in the checkpoint without being part of the text model."""
        family = self.layout.family
        return tensor.startswith(family.beside) or any(re.search(pattern, tensor) for pattern in family.leftovers)

    def slot_of_module(self, path: str) -> Slot:
        """The slot of a module as an adapter names it, such as `model.layers.0.self_attn.q_proj`.

        Paths of this and of earlier releases of the stock class are known, with or without the base model's name
        before them. A module that holds several roles gives the whole tensor; its `role` joins their names by `+`.

        Raises:
            InputError: the model has no such module, or the checkpoint no tensor of its own for it.
        """
        return slot_of_module(self.layout, path, self.num_experts)

    def expert_tensors(self, path: str) -> list[tuple[Slot, ...]]:
        """The slots behind a parameter that the stock class stacks over experts, such as `...mlp.experts.gate_up_proj`.

        Returns for each expert the slots whose matrices, one below the other, are its part of the parameter.

        Raises:
            InputError: the model has no such parameter.
        """
        layer, roles = expert_tensors(self.layout, path)
        return [tuple(self.slot(role, layer, expert) for role in roles) for expert in range(self.num_experts)]

    def _part(self, role: str, layer: int | None) -> Part:
        parts = self.layout.parts_of(role)
        if not parts or (role == "lm_head" and self.headless):
            raise self._refusal(role, layer)
        if layer is not None and not parts[0].per_layer:
            raise UsageError(
                "stands outside the layers", where=role, found=f"layer {layer}", remedy="ask without a layer"
            )
        if layer is None and parts[0].per_layer:
            raise UsageError(
                "is a role of the layers",
                where=role,
                expected=f"a layer, 0 to {self.num_layers - 1}",
                remedy="name the layer",
            )
        number = OUTSIDE if layer is None else self._checked(layer)
        for part in self.layout.present(number):
            if role in part.role_names():
                return part
        raise self._refusal(role, layer)

    def _refusal(self, role: str, layer: int | None) -> Unsupported:
        place = self.model_type if layer is None else f"{self.model_type}, layer {layer}"
        if role == "lm_head" and self.headless:
            return Unsupported(
                "this is a checkpoint of the base model, without an output head",
                where=place,
                remedy="use a checkpoint of the causal language model",
            )
        known = [*self.roles(), *self.roles(0 if layer is None else layer)]
        return Unsupported(
            f"it is not known where, or whether, this model stores {role}",
            where=place,
            expected=f"one of {', '.join(known)}",
            found=role,
            remedy="use another transformation, or describe the family in a plugin (regraft_architectures)",
        )

    def _checked(self, layer: int) -> int:
        return _checked_index(layer, self.num_layers, "layer")


def _checked_index(index: int, count: int, what: str) -> int:
    if 0 <= index < count:
        return index
    raise UsageError(
        f"there is no {what} {index}", expected=f"0 to {count - 1}", remedy=f"name a {what} that the model has"
    )
