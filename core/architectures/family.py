"""The declarative description of a model family: its config defaults and where its roles are stored.

A family is a table of parts. A part is one tensor, or one per layer or expert, with the roles whose rows it holds.
Paths are relative to the base model (`model` in most families), and `{layer}` and `{expert}` stand for numbers. Sizes
are numbers, or keys of the settings that `Family.settings` works out from config.json.

    Family(
        model_type="my_model",
        parts=(
            embedding("embed_tokens", "embed_tokens"),
            linear("layers.{layer}.attn.qkv", q_proj="q_size", k_proj="kv_size", v_proj="kv_size", bias="use_bias"),
            ...,
            head(),
        ),
        defaults={"use_bias": False, "tie_word_embeddings": True},
    )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.core.errors import InputError
from regraft.core.jsonio import brief

Settings = Mapping[str, Any]
"""The settings of one model: config.json under llama's names, with the stock class's defaults filled in."""

Size = int | str
"""An extent: a number, or the key of a setting."""

ROTARY_LEFTOVER = r"rotary_emb\.inv_freq$"
"""Rotary frequencies, which old releases stored in every layer; stock classes with rotary embeddings ignore them."""

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")


MAX_SIZE, MAX_LAYERS, MAX_PLACES = 1 << 40, 10_000, 1 << 20
"""Far above any model: a size, the layers, layers times experts. What lies beyond would be counted for ever."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a family, its bias, and the roles that it holds.

    Args:
        path: path in the stock class, of the module, or of the parameter itself if `parameter`.
        roles: the roles whose output rows the tensor holds, in order, with the number of rows of each.
        columns: input features; None for a vector such as a norm.
        bias: whether there is a bias of the same rows, or the key of config.json that decides it.
        transposed: stored as (in_features, out_features).
        interleaved: the three roles are q, k and v, and alternate per key-value group.
        stored: paths under which checkpoints hold it, if not under `path`; the first is what transformers writes.
        experts: the tensor stacks this many experts along its first dimension.
        parameter: the path names the tensor itself, without `.weight`.
        outside: the path counts from the top of the checkpoint, not from the base model.
        when: whether the layer (-1 outside layers) of a model with these settings has it.
    """

    path: str
    roles: tuple[tuple[str, Size], ...]
    columns: Size | None = None
    bias: bool | str = False
    transposed: bool = False
    interleaved: bool = False
    stored: tuple[str, ...] = ()
    experts: Size | None = None
    parameter: bool = False
    outside: bool = False
    when: Callable[[Settings, int], bool] | None = None

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.path

    @property
    def per_expert(self) -> bool:
        """Whether every expert has one of its own."""
        return "{expert}" in self.path

    def role_names(self) -> tuple[str, ...]:
        """Names of the roles that it holds."""
        return tuple(role for role, _ in self.roles)


def linear(
    path: str,
    *,
    columns: Size = "hidden_size",
    bias: bool | str = False,
    transposed: bool = False,
    interleaved: bool = False,
    stored: tuple[str, ...] = (),
    when: Callable[[Settings, int], bool] | None = None,
    **roles: Size,
) -> Part:
    """A projection that holds one role, or several; a role is a keyword argument whose value is its number of rows."""
    return Part(
        path=path,
        roles=tuple(roles.items()),
        columns=columns,
        bias=bias,
        transposed=transposed,
        interleaved=interleaved,
        stored=stored,
        when=when,
    )


def norm(
    path: str,
    role: str,
    size: Size = "hidden_size",
    *,
    bias: bool = False,
    when: Callable[[Settings, int], bool] | None = None,
) -> Part:
    """A norm's weight, with a bias if it is a LayerNorm."""
    return Part(path=path, roles=((role, size),), bias=bias, when=when)


def embedding(path: str, role: str, rows: Size = "vocab_size") -> Part:
    """A table of `rows` vectors of the hidden size."""
    return Part(path=path, roles=((role, rows),), columns="hidden_size")


def head(path: str = "lm_head", *, stored: tuple[str, ...] = ()) -> Part:
    """The output head, which stands beside the base model."""
    return Part(path=path, roles=(("lm_head", "vocab_size"),), columns="hidden_size", outside=True, stored=stored)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a model family keeps its roles. A plugin returns such rows from `regraft_architectures`.

    Args:
        model_type: the `model_type` of config.json.
        parts: every tensor of the model.
        defaults: what a key absent from config.json means, as in the stock config class, by llama's name of the key.
        name: the family's name in messages, if it differs from `model_type`.
        base: path of the base model in the stock causal-LM class.
        stored_bases: paths of the base model in checkpoints, if not `base`; the first is what transformers writes.
        aliases: this family's names of config keys, by llama's name.
        nested: key of config.json under which the text model's config stands.
        settle: settings that follow from others, beyond the usual rules.
        leftovers: regular expressions (searched) of tensors that old checkpoints hold and the stock class ignores.
        beside: name prefixes of tensors that belong to other than the text model.
        norm_offset: what norms add to their stored weight: 1 in Gemma, 0 in most; None if unknown.
    """

    model_type: str
    parts: tuple[Part, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    base: str = "model"
    stored_bases: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    nested: str = ""
    settle: Callable[[Settings], Mapping[str, Any]] | None = None
    leftovers: tuple[str, ...] = (ROTARY_LEFTOVER,)
    beside: tuple[str, ...] = ()
    norm_offset: float | None = 0.0

    @property
    def label(self) -> str:
        """The family's name in messages."""
        return self.name or self.model_type

    def prefixes(self) -> tuple[str, ...]:
        """Prefixes that base-model paths can have in a checkpoint, the usual one first, none at all last."""
        bases = [*self.stored_bases, self.base]
        return (*dict.fromkeys(f"{base}." for base in bases if base), "")

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """The settings of a model with this config.json, defaults filled in as the stock config class does.

        A key that is absent takes the family's default; then one that is null follows the usual rule: as many
        key-value heads as heads, `head_dim` the hidden size over the heads.

        Raises:
            InputError: a key is missing, has the wrong type, or contradicts another.
        """
        found = self._text_config(config)
        keys = {*found, *self.defaults, *self.aliases}
        settings = {key: self._lookup(found, key) for key in sorted(keys)}
        if settings.get("num_key_value_heads") is None:
            settings["num_key_value_heads"] = settings.get("num_attention_heads")
        if self.settle:
            settings |= self.settle(settings)
        if settings.get("head_dim") is None:
            settings["head_dim"] = _even_head_dim(settings)
        for key in REQUIRED:
            _check_count(settings, key)
        _check_places(settings)
        if settings["num_attention_heads"] % settings["num_key_value_heads"]:
            raise InputError(
                "the heads cannot be shared out among the key-value heads",
                where="config.json: num_key_value_heads",
                expected=f"a divisor of {settings['num_attention_heads']}",
                found=settings["num_key_value_heads"],
                remedy="correct config.json",
            )
        settings["q_size"] = settings["num_attention_heads"] * settings["head_dim"]
        settings["kv_size"] = settings["num_key_value_heads"] * settings["head_dim"]
        return settings

    def _text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.nested:
            return config
        text = config.get(self.nested) or {}
        if not isinstance(text, Mapping):
            raise InputError(
                "is not an object",
                where=f"config.json: {self.nested}",
                expected="the text model's config",
                found=type(text).__name__,
                remedy="correct config.json",
            )
        tied = config.get("tie_word_embeddings", self.defaults.get("tie_word_embeddings"))
        return {**text, "tie_word_embeddings": tied}

    def _lookup(self, config: Mapping[str, Any], key: str) -> Any:
        for name in (*self.aliases.get(key, ()), key):
            if name in config:
                return config[name]
        return self.defaults.get(key)


def _even_head_dim(settings: Settings) -> int:
    for key in ("hidden_size", "num_attention_heads"):
        _check_count(settings, key)
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    if hidden % heads:
        raise InputError(
            "is not a multiple of num_attention_heads, and there is no head_dim",
            where="config.json: hidden_size",
            expected=f"a multiple of {heads}",
            found=hidden,
            remedy="add head_dim to config.json",
        )
    return int(hidden // heads)


def _check_count(settings: Settings, key: str) -> None:
    value = settings.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE:
        return
    raise InputError(
        "is missing or no positive whole number",
        where=f"config.json: {key}",
        expected=f"at most {MAX_SIZE}" if type(value) is int and value > 0 else "a positive whole number",
        found="nothing" if value is None else brief(value),
        remedy="correct config.json",
    )


def _check_places(settings: Settings) -> None:
    layers, experts = settings["num_hidden_layers"], settings.get("num_local_experts")
    if layers > MAX_LAYERS:
        raise InputError(
            "are more layers than a model can have",
            where="config.json: num_hidden_layers",
            expected=f"at most {MAX_LAYERS}",
            found=layers,
            remedy="correct config.json",
        )
    if isinstance(experts, int) and experts * layers > MAX_PLACES:
        raise InputError(
            "are more experts than a model can have",
            where="config.json: num_local_experts",
            expected=f"at most {MAX_PLACES} in all layers",
            found=experts * layers,
            remedy="correct config.json",
        )
