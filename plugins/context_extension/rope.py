"""Rotary parameters in config.json: read as transformers 5 reads them, extended, written in every form that is there.

transformers 5 keeps them in `rope_parameters` (per kind of layer in Gemma 3). Older configs have `rope_theta` (under
the family's name for it) and `rope_scaling`; transformers 5 still reads those, and prefers `rope_scaling` where both
are given. What is written agrees in both forms.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regraft.core.errors import InputError, Unsupported
from regraft.core.jsonio import brief
from regraft.plugins.context_extension.families import RotaryFamily
from regraft.plugins.context_extension.math import abf_theta, ntk_theta
from regraft.plugins.context_extension.params import ContextExtensionParams

FULL, SLIDING = "full_attention", "sliding_attention"
_NUMBERS = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""What the scalings cannot do without."""
_OPTIONAL_NUMBERS = ("beta_fast", "beta_slow", "attention_factor")
_LARGEST, _MAX_HEAD_DIM = 1e15, 1 << 16
"""What no honest config comes near: beyond, arithmetic overflows, or takes for ever."""
_START = "start from the checkpoint that was not scaled yet"


@dataclass(frozen=True)
class Rope:
    """Rotary parameters of the layers that see the whole context.

    Args:
        parameters: `rope_parameters` with rope_type and rope_theta filled in.
        dim: rotary dimensions of a head.
    """

    parameters: Mapping[str, Any]
    dim: int

    @property
    def kind(self) -> str:
        """The rope type, `default` if positions are not scaled."""
        return str(self.parameters["rope_type"])

    @property
    def theta(self) -> float:
        """The base."""
        return float(self.parameters["rope_theta"])


def text_config(config: Mapping[str, Any], family: RotaryFamily) -> Mapping[str, Any]:
    """The part of config.json that describes the text model.

    Raises:
        InputError: there is none.
    """
    text = config.get(family.nested) if family.nested else config
    if not isinstance(text, Mapping):
        raise InputError(
            "is missing or no object",
            where=f"config.json: {family.nested}",
            expected="the text model's config",
            remedy="correct config.json",
        )
    return text


def read_rope(text: Mapping[str, Any], family: RotaryFamily) -> Rope:
    """The rotary parameters in a text model's config.

    Raises:
        InputError: they are malformed.
        Unsupported: kinds of layers have their own in a way that is not this family's.
    """
    given = _given(text, family)
    theta = given.get("rope_theta", text.get(family.theta_key, family.theta))
    partial = given.get("partial_rotary_factor", text.get(family.partial_key, family.partial))
    for key, value, least in ((family.theta_key, theta, 1), (family.partial_key, partial, 0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not least < value <= _LARGEST:
            raise InputError(
                "is out of range",
                where=f"config.json: {key}",
                expected=f"a number above {least}",
                found=repr(value),
                remedy="correct config.json",
            )
    kind = given.get("rope_type", given.get("type", "default"))
    _check_scaling(given, kind)
    parameters = {key: value for key, value in given.items() if key != "type"}
    parameters |= {"rope_type": kind, "rope_theta": theta}
    if partial != 1:
        parameters["partial_rotary_factor"] = partial
    return Rope(parameters, int(_head_dim(text, family) * partial))


def extended(rope: Rope, family: RotaryFamily, params: ContextExtensionParams, original: int) -> tuple[Rope, list[str]]:
    """The parameters for `params.target_length`, and notes on what was composed with a scaling that was there.

    Args:
        rope: as `read_rope` gives them.
        family: the model's row.
        params: method and lengths.
        original: the length the model was trained on.

    Raises:
        Unsupported: the method cannot be composed with the scaling that is there, or the stock class does not read
            the result.
    """
    _check_composition(rope, params.method)
    factor = params.target_length / original
    after = dict(rope.parameters)
    notes = []
    if params.method in ("linear", "yarn"):
        _check_readable(family, params.method)
    if params.method == "linear":
        after |= {"rope_type": "linear", "factor": factor * rope.parameters.get("factor", 1.0)}
        if rope.kind == "linear":
            notes.append(f"positions were interpolated by {rope.parameters['factor']:g} already: the factors multiply")
    elif params.method == "yarn":
        after = _yarn(rope, params, original)
        if rope.kind == "yarn":
            notes.append(f"the YaRN factor {rope.parameters['factor']:g} that was there is replaced by {factor:g}")
    else:
        after["rope_theta"] = _theta(rope, params, factor)
        if rope.kind != "default":
            notes.append(f"the {rope.kind} scaling that was there stays; only its base grows")
    return Rope(after, rope.dim), notes


def written(text: Mapping[str, Any], family: RotaryFamily, rope: Rope, length: int) -> dict[str, Any]:
    """The text model's config with `rope` and `max_position_embeddings` = `length`, in each form that it had."""
    after = copy.deepcopy(dict(text))
    after["max_position_embeddings"] = length
    parameters = dict(rope.parameters)
    if rope.kind == "yarn" and text.get("head_dim") is None and ("head_dim" in text or family.nullable_head_dim):
        after["head_dim"] = _head_dim(text, family)
    if family.local_key:
        sliding = (text.get("rope_parameters") or {}).get(SLIDING)
        local = {"rope_type": "default", "rope_theta": text.get(family.local_key, family.local_theta)}
        after["rope_parameters"] = {SLIDING: dict(sliding or local), FULL: parameters}
    else:
        after["rope_parameters"] = parameters
    if family.theta_key in text or "rope_scaling" in text:
        after[family.theta_key] = rope.theta
        if rope.kind != "default":
            own = ("rope_theta", "partial_rotary_factor")
            scaling = {key: value for key, value in parameters.items() if key not in own}
            after["rope_scaling"] = {**scaling, "type": rope.kind}
    return after


def _given(text: Mapping[str, Any], family: RotaryFamily) -> dict[str, Any]:
    parameters, scaling = text.get("rope_parameters") or {}, text.get("rope_scaling") or {}
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            raise InputError(
                "is not an object",
                where=f"config.json: {name}",
                expected="an object",
                found=repr(value),
                remedy="correct config.json",
            )
    per_layer = any(isinstance(value, Mapping) for value in parameters.values())
    if family.local_key:
        if parameters and not per_layer:
            raise Unsupported(
                "the rotary parameters are not given per kind of layer",
                where="config.json: rope_parameters",
                expected=f"{FULL} and {SLIDING}",
                found=", ".join(parameters),
                remedy="correct config.json",
            )
        return {**(parameters.get(FULL) or {"rope_type": "default"}), **scaling}
    if per_layer:
        raise Unsupported(
            "kinds of layers have rotary parameters of their own",
            where="config.json: rope_parameters",
            expected="one set for all layers",
            found=", ".join(parameters),
            remedy="choose a model with one set for all layers, or a Gemma 3",
        )
    return dict(scaling or parameters)


def _check_scaling(given: Mapping[str, Any], kind: Any) -> None:
    """Refuse a scaling that lacks a number of its kind, or has something else in its place."""
    needed = _NUMBERS.get(kind, ()) if isinstance(kind, str) else ()
    for key in (*needed, *(key for key in _OPTIONAL_NUMBERS if given.get(key) is not None)):
        value = given.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
            raise InputError(
                "is missing or no positive number",
                where=f"config.json: rope_parameters: {key}",
                expected=f"a positive number, which rope_type {kind} needs",
                found=brief(value),
                remedy="correct config.json",
            )
    if kind == "llama3" and given["low_freq_factor"] == given["high_freq_factor"]:
        raise InputError(
            "low_freq_factor and high_freq_factor are the same",
            where="config.json: rope_parameters",
            expected="two numbers",
            found=given["low_freq_factor"],
            remedy="correct config.json",
        )


def _head_dim(text: Mapping[str, Any], family: RotaryFamily) -> int:
    head_dim = text.get("head_dim") or family.head_dim
    if head_dim is None:
        hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
            raise InputError(
                "the width of a head cannot be told",
                where="config.json: hidden_size, num_attention_heads",
                expected="two whole numbers",
                found=f"{hidden!r}, {heads!r}",
                remedy="correct config.json",
            )
        head_dim = hidden // heads
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or not 0 < head_dim <= _MAX_HEAD_DIM:
        raise InputError(
            "is no width of a head",
            where="config.json: head_dim",
            expected=f"a whole number from 1 to {_MAX_HEAD_DIM}",
            found=brief(head_dim),
            remedy="correct config.json",
        )
    return head_dim


def _check_composition(rope: Rope, method: str) -> None:
    works_on = {
        "default": ("entropy-abf", "abf", "linear", "ntk", "yarn"),
        "linear": ("entropy-abf", "abf", "linear", "ntk"),
        "llama3": ("entropy-abf", "abf"),
        "yarn": ("yarn",),
    }
    methods = works_on.get(rope.kind, ())
    if method not in methods:
        raise Unsupported(
            f"positions are scaled already, and {method} cannot be composed with that",
            where="config.json: rope_parameters, rope_scaling",
            expected="rope_type default",
            found=f"rope_type {rope.kind}",
            remedy=f"use method {' or '.join(methods)}, or {_START}" if methods else _START,
        )
    if rope.dim < 4:
        raise Unsupported(
            "a head has too few rotary dimensions",
            where="config.json: head_dim",
            expected="4 or more",
            found=rope.dim,
            remedy="choose another model",
        )


def _check_readable(family: RotaryFamily, method: str) -> None:
    if method not in family.rope_types:
        raise Unsupported(
            f"{family.stock_class} does not read rope_type {method}",
            where="config.json: model_type",
            expected=f"one of {', '.join(sorted(family.rope_types)) or 'default'}",
            found=method,
            remedy="use method ntk, abf or entropy-abf, which change the base alone",
        )


def _theta(rope: Rope, params: ContextExtensionParams, factor: float) -> float:
    if params.method == "ntk":
        return ntk_theta(rope.theta, factor, rope.dim)
    if params.rope_theta == "auto":
        return abf_theta(rope.theta, factor, rope.dim)
    if params.rope_theta < rope.theta:
        raise Unsupported(
            "the new base is smaller than the one that is there, which shortens the context",
            where="rope_theta",
            expected=f"at least {rope.theta:g}",
            found=f"{params.rope_theta:g}",
            remedy='leave rope_theta at "auto"',
        )
    return params.rope_theta


def _yarn(rope: Rope, params: ContextExtensionParams, original: int) -> dict[str, Any]:
    kept = (
        "rope_theta",
        "partial_rotary_factor",
        *(("beta_fast", "beta_slow", "truncate") if rope.kind == "yarn" else ()),
    )
    after = {key: rope.parameters[key] for key in kept if key in rope.parameters}
    after |= {
        "rope_type": "yarn",
        "factor": params.target_length / original,
        "original_max_position_embeddings": original,
    }
    for key in ("attention_factor", "beta_fast", "beta_slow"):
        if (value := getattr(params, key)) is not None:
            after[key] = value
    return after
