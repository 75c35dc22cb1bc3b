"""config.json of a model that is written as another stock class: every number that decides what is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.core.errors import Unsupported

DEFAULT_THETA = 10000.0
"""Rotary base of the three source classes where the config gives none."""

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip
_CARRIED = ("dtype", "torch_dtype", "transformers_version", "use_cache")
_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Source:
    """A class whose models can be written as another.

    Args:
        model_type: of config.json.
        prefix: what its class names start with.
        defaults: what the stock config class takes for keys that are absent, and that the target would take otherwise.
        tokenizer: the tokenizer class that transformers 5 takes for this family whatever the tokenizer's config names;
            None where that decides.
    """

    model_type: str
    prefix: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None


_SHARED = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "attention_dropout": 0.0}
SOURCES = {
    source.model_type: source
    for source in (
        Source(
            "qwen2",
            "Qwen2",
            {
                **_SHARED,
                "max_position_embeddings": 32768,
                "use_sliding_window": False,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
            tokenizer="Qwen2Tokenizer",
        ),
        Source(
            "mistral",
            "Mistral",
            {
                **_SHARED,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
        Source(
            "phi3",
            "Phi3",
            {
                **_SHARED,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "sliding_window": None,
                "bos_token_id": 1,
                "eos_token_id": 32000,
                "pad_token_id": 32000,
            },
        ),
    )
}
"""By `model_type`."""

_CLASS_PREFIX = {"llama": "Llama", "smollm3": "SmolLM3"}


def target_config(
    config: Mapping[str, Any], settings: Mapping[str, Any], source: Source, target: str
) -> dict[str, Any]:
    """The target's config.json, its biases left out.

    Args:
        config: config.json as it is.
        settings: the same under llama's names, defaults of counts filled in.
        source, target: the classes.

    Raises:
        Unsupported: the target would not compute the same.
    """
    _check_code(config)
    given = {**source.defaults, **config}
    result: dict[str, Any] = {"architectures": _class_names(config, source, target), "model_type": target}
    result |= {key: config[key] for key in _CARRIED if key in config}
    result |= {key: settings[key] for key in _COUNTS}
    result |= {key: given[key] for key in (*_SHARED, "max_position_embeddings")}
    if target == "llama" and settings["hidden_size"] % settings["num_attention_heads"]:
        raise _refusal(target, "its config class wants hidden_size to be a multiple of num_attention_heads",
                       "config.json: hidden_size", settings["hidden_size"])  # fmt: skip
    result |= _windows(given, settings, source, target)
    result |= _rope(given, source, target)
    return result | _token_ids(given, target)


def _refusal(target: str, reason: str, where: str, found: object) -> Unsupported:
    return Unsupported(
        f"cannot be written as {target}: {reason}",
        where=where,
        found=found,
        remedy="use a site that the model's own class has a bias for",
    )


def _check_code(config: Mapping[str, Any]) -> None:
    for key in ("attn_implementation", "_attn_implementation"):
        if config.get(key):
            raise Unsupported(
                "the checkpoint names an attention of its own, which another class would not have",
                where=f"config.json: {key}",
                found=config[key],
                remedy="add the biases before the step that brings the code",
            )


def _class_names(config: Mapping[str, Any], source: Source, target: str) -> list[str]:
    names = config.get("architectures") or [f"{source.prefix}ForCausalLM"]
    known = {f"{source.prefix}{kind}": f"{_CLASS_PREFIX[target]}{kind}" for kind in ("ForCausalLM", "Model")}
    for name in names:
        if name not in known:
            raise Unsupported(
                "only the language model can be written as another class",
                where="config.json: architectures",
                expected=" or ".join(known),
                found=name,
                remedy="use the causal language model",
            )
    return [known[name] for name in names]


def _windows(given: Mapping[str, Any], settings: Mapping[str, Any], source: Source, target: str) -> dict[str, Any]:
    """Sliding windows as SmolLM3 writes them, and rotary positions in all of its layers; nothing for Llama."""
    layers, window = settings["num_hidden_layers"], given["sliding_window"]
    types = ["sliding_attention" if window is not None else "full_attention"] * layers
    if source.model_type == "qwen2":
        window = window if given["use_sliding_window"] else None
        first = given["max_window_layers"] if window is not None else layers
        types = given.get("layer_types") or [
            "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
        ]
    slides = "sliding_attention" in types
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown or len(types) != layers or (slides and window is None):
        raise _refusal(target, "it is not known which of its layers slide over which window",
                       "config.json: layer_types", unknown or types)  # fmt: skip
    if target == "llama":
        if slides:
            raise _refusal(target, "it has no sliding window, and sequences may be longer than this one",
                           "config.json: sliding_window", window)  # fmt: skip
        return {}
    windows = {"use_sliding_window": True, "sliding_window": window} if slides else {"use_sliding_window": False}
    return {**windows, "layer_types": list(types), "no_rope_layers": [1] * layers}


def _rope(given: Mapping[str, Any], source: Source, target: str) -> dict[str, Any]:
    """Rotary parameters in the place where the config has them, the base written out because defaults differ.

    transformers 5 reads `rope_parameters`, or `rope_scaling` before it; earlier releases `rope_theta` and
    `rope_scaling` only.
    """
    scaling = given.get("rope_scaling") or given.get("rope_parameters") or {}
    theta = scaling.get("rope_theta", given.get("rope_theta", DEFAULT_THETA))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = scaling.get("partial_rotary_factor", given.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise _refusal(target, "it turns whole heads, this model only a part of each",
                       "config.json: partial_rotary_factor", partial)  # fmt: skip
    dropped = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
    rope = {key: value for key, value in scaling.items() if key not in dropped}
    result: dict[str, Any] = {}
    if source.model_type == "phi3":
        kind = "longrope" if kind in ("su", "yarn") else kind
        if kind == "longrope":
            result["original_max_position_embeddings"] = given["original_max_position_embeddings"]
            rope["original_max_position_embeddings"] = given["original_max_position_embeddings"]
    elif "original_max_position_embeddings" in given:
        result["original_max_position_embeddings"] = given["original_max_position_embeddings"]
    if "rope_parameters" in given:
        return {**result, "rope_parameters": {"rope_type": kind, "rope_theta": theta, **rope}}
    return {**result, "rope_theta": theta, **({"rope_scaling": {"rope_type": kind, **rope}} if scaling else {})}


def _token_ids(given: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Ids of special tokens, written out because the classes' defaults differ; a null cannot be written by a patch."""
    eos = given.get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(first, int):
        raise Unsupported(
            f"cannot be written as {target}, which would take its own default for it",
            where="config.json: eos_token_id",
            expected="a token id",
            found=eos,
            remedy="set it in config.json",
        )
    ids = {key: first if given.get(key) is None else given[key] for key in _IDS}
    if given.get("pad_token_id") is None and target == "llama":
        del ids["pad_token_id"]
    return ids
