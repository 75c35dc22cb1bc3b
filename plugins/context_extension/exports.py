"""How a checkpoint carries the logit scale of entropy-abf: as a Ministral3, or by code of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from regraft.core.checkpoint import TOKENIZER_CONFIG, Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.portable_code import CodePatch, code_patch, portable_code, read_template, refuse_other_code
from regraft.plugins.context_extension.families import RotaryFamily
from regraft.plugins.context_extension.rope import Rope

CARRIER = "ministral3"
CARRIER_CLASS = "Ministral3ForCausalLM"
MODULE = "modeling_entropy_abf"
CLASS = "EntropyAbfForCausalLM"
_REMEDY = 'use export = "remote-code"'
_SAME_TOKENIZER = (None, "TokenizersBackend", "PreTrainedTokenizer")

NATIVE_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-06,
            "use_cache": True,
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
        },
        "mistral": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": None,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-06,
            "use_cache": True,
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
        },
    }
)
"""What an absent key means in the families that Ministral3 can carry; its own defaults differ, so all are written."""


def check_native(checkpoint: Checkpoint, family: RotaryFamily, rope: Rope, window: int) -> None:
    """Refuse what Ministral3 cannot compute.

    Raises:
        Unsupported: with what stands in the way.
    """
    config = checkpoint.config
    if config.get("model_type") not in NATIVE_DEFAULTS:
        raise _not_native("model_type", " or ".join(NATIVE_DEFAULTS), config.get("model_type"))
    refuse_other_code(checkpoint)
    check_class(config, family)
    for switch in ("attention_bias", "mlp_bias"):
        if config.get(switch):
            raise _not_native(switch, "false", config[switch])
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise _not_native("hidden_act", "silu", act)
    window_back = config.get("sliding_window", family.window) if family.windows != "never" else None
    if window_back is not None:
        raise _not_native("sliding_window", "null", window_back)
    if rope.kind == "llama3" and rope.parameters["original_max_position_embeddings"] != window:
        raise _not_native(
            "rope_parameters.original_max_position_embeddings",
            f"{window}, the window that the scale counts from",
            rope.parameters["original_max_position_embeddings"],
        )
    if "tokenizer.model" in checkpoint.files and "tokenizer.json" not in checkpoint.files:
        raise Unsupported(
            "transformers reads the tokenizer of a ministral3 from tokenizer.json, which is missing",
            where="tokenizer.model",
            expected="tokenizer.json beside it",
            remedy=f"save the tokenizer in the fast format, or {_REMEDY}",
        )


def native_config(text: Mapping[str, Any], window: int, beta: float) -> dict[str, Any]:
    """config.json of the Ministral3 that computes what the llama or mistral of `text` computes, with scaled queries.

    Args:
        text: config.json with the new rotary parameters.
        window: c; Ministral3 reads it as `original_max_position_embeddings`.
        beta: slope of the staircase.
    """
    defaults = NATIVE_DEFAULTS[str(text["model_type"])]
    after = {**{key: value for key, value in defaults.items() if key not in text}, **text}
    if after["num_key_value_heads"] is None:
        after["num_key_value_heads"] = after["num_attention_heads"]
    if after["head_dim"] is None:
        after["head_dim"] = after["hidden_size"] // after["num_attention_heads"]
    if after["pad_token_id"] is None and "pad_token_id" not in text:
        # A merge patch cannot add a null, and without the key Ministral3 pads with 11. generate() would pad with eos.
        eos = after["eos_token_id"]
        after["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    after["rope_parameters"] = {
        **after["rope_parameters"],
        "original_max_position_embeddings": window,
        "llama_4_scaling_beta": beta,
    }
    after["llama_4_scaling"] = {"original_max_position_embeddings": window, "beta": beta}
    after["model_type"], after["architectures"] = CARRIER, [CARRIER_CLASS]
    # transformers prefers rope_scaling to rope_parameters, and only the latter holds the scale.
    after.pop("rope_scaling", None)
    # Llama has no sliding window, whatever its config says; Ministral3 would obey.
    if after.get("sliding_window") is not None:
        del after["sliding_window"]
    return after


def native_notes(checkpoint: Checkpoint) -> list[str]:
    """What a user of the Ministral3 should know."""
    notes = [
        "every layer is scaled: the stock class has no exempt layers (the paper exempts the first two, its code none)"
    ]
    if checkpoint.config.get("pad_token_id", "absent") == "absent":
        notes.append(
            "config.json named no pad token: the end-of-sequence token is written, because Ministral3 would take 11"
        )
    name = checkpoint.json(TOKENIZER_CONFIG).get("tokenizer_class")
    if isinstance(name, str) and name.removesuffix("Fast") not in _SAME_TOKENIZER:
        notes.append(
            "AutoTokenizer of transformers 5 reads tokenizer.json as it stands for a ministral3, and builds a "
            f"{name.removesuffix('Fast')} for a {checkpoint.config['model_type']}: token ids can differ"
        )
    return notes


def check_remote_code(checkpoint: Checkpoint, family: RotaryFamily) -> None:
    """Refuse what the wrapper around the stock attention function cannot reach.

    Raises:
        Unsupported: with what stands in the way.
    """
    refuse_other_code(checkpoint)
    if family.attention is None:
        raise Unsupported(
            "the attention of this family cannot be wrapped",
            where="config.json: model_type",
            expected="a class that calls transformers' attention interface and hands it position_ids",
            found=checkpoint.config.get("model_type"),
            remedy='use export = "abf-only"',
        )
    check_class(checkpoint.config, family)


def remote_code(model_type: str, family: RotaryFamily, window: int, skip_layers: int) -> CodePatch:
    """The modeling file, and the config keys that make transformers use it or fail.

    Args:
        model_type: a key of `FAMILIES`.
        family: its row.
        window: c.
        skip_layers: first layers that are not scaled.
    """
    # All that the function depends on is part of its name, so that several such checkpoints can live in one process.
    prefix = f"regraft_entropy_abf_{model_type}_{window}_{skip_layers}_"
    literals = {
        "original_length": window,
        "skip_layers": skip_layers,
        "prefix": prefix,
        "stock_class": family.stock_class,
        "renamed": dict(family.renamed) or None,
    }
    code = portable_code(read_template(__package__, f"{MODULE}.py.template"), literals)
    return code_patch(MODULE, CLASS, code, attn_implementation=f"{prefix}{family.attention}")


def check_class(config: Mapping[str, Any], family: RotaryFamily) -> None:
    """Refuse a checkpoint of another head than the causal language model's.

    Raises:
        Unsupported: it has one.
    """
    architectures = config.get("architectures") or [family.stock_class]
    if architectures != [family.stock_class]:
        raise Unsupported(
            "the logit scale is written for the causal language model alone",
            where="config.json: architectures",
            expected=family.stock_class,
            found=", ".join(map(str, architectures)),
            remedy='use export = "abf-only"',
        )


def _not_native(key: str, expected: object, found: object) -> Unsupported:
    return Unsupported(
        "no stock class carries the logit scale for this model",
        where=f"config.json: {key}",
        expected=expected,
        found=found,
        remedy=_REMEDY,
    )
