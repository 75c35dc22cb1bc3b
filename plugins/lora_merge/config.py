"""adapter_config.json: what it says about the merge, and a refusal of what regraft would not do as peft does.

Every field of `LoraConfig` in peft 0.21 is either read here, or known not to matter for a merge, or refused by name if
it is set; a field that peft did not have then is refused if it is set.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.core.errors import InputError, Unsupported
from regraft.core.jsonio import read_object
from regraft.plugins.lora_merge.math import effective_scale

CONFIG_FILE = "adapter_config.json"

READ = frozenset({
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "use_dora", "target_parameters",
    "init_lora_weights", "ensure_weight_tying", "modules_to_save", "base_model_name_or_path", "peft_type",
})  # fmt: skip
"""Fields that decide how the tensors are merged."""

WITHOUT_EFFECT = frozenset({
    # which modules: the tensors of the file say it
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "lora_bias",
    # training and loading
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "runtime_config",
    "velora_config", "megatron_core", "merge_weights",
    # settings of initialisations and of options that are refused by their own field
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
})  # fmt: skip
"""Fields without effect on a merge, whatever they hold."""

REFUSED = {
    "alora_invocation_tokens": "it applies only after its invocation tokens, so there is no merged weight",
    "arrow_config": "Arrow routes every token to adapters of its own, so there is no merged weight",
    "use_qalora": "QALoRA pools its inputs, which the layers of the base do not",
    "use_bdlora": "block-diagonal LoRA stores its factors in another form",
    "kasa_config": "KaSA truncates the base weight by a decomposition before training",
    "monteclora_config": "MonteCLoRA samples its factors",
    "layer_replication": "the adapter belongs to a model whose layers were replicated",
    "megatron_config": "the adapter belongs to Megatron's parallel layers",
    "trainable_token_indices": "it replaces single rows of the embedding",
}
"""Fields that are refused if set, with the reason."""

_MAX_RANK = 1 << 20
_MAX_REPEATS = 4
_REPEATED_GROUP = re.compile(r"\)[*+{]")
"""What makes a regular expression take time exponential in the length of a path."""
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter's config says about the merge.

    Args:
        rank, alpha: for modules that no pattern names.
        rank_pattern, alpha_pattern: regular expression of module paths -> value; the first that fits counts.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        fan_in_fan_out: what the adapter says of the orientation of its weights; decides only where the family does not.
        dora: the adapter has magnitude vectors.
        keeps_ties: embeddings and head were trained as one matrix.
        modules_to_save: names of modules that were trained whole.
        target_parameters: names of parameters, such as `experts.gate_up_proj`, that were adapted without a module.
        base_model: the model it was trained for, as the adapter names it; may be empty.
        initialisation: `init_lora_weights` where that changed the base weights, else empty.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool = False
    fan_in_fan_out: bool = False
    dora: bool = False
    keeps_ties: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    base_model: str = ""
    initialisation: str = ""

    def rank_of(self, path: str) -> int:
        """The rank of the module at `path`."""
        return int(_first_match(self.rank_pattern, path, self.rank))

    def scale_of(self, path: str) -> float:
        """What the product of the module's factors is multiplied with."""
        alpha = _first_match(self.alpha_pattern, path, self.alpha)
        return effective_scale(alpha, self.rank_of(path), rslora=self.rslora)


def read_settings(folder: Path) -> LoraSettings:
    """Read and check `adapter_config.json`.

    Raises:
        InputError: it is missing, malformed, or no PEFT config.
        Unsupported: the adapter is not a LoRA, or uses an option that regraft does not merge.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"the adapter folder has no {CONFIG_FILE}", where=folder,
                         expected=f"a PEFT adapter: {CONFIG_FILE} and adapter_model.safetensors",
                         remedy="name the folder that peft's save_pretrained wrote")  # fmt: skip
    config = read_object(path)
    _check_kind(config, path)
    _refuse_options(config, path)
    return LoraSettings(
        rank=int(_number(config, "r", 8, path, whole=True)),
        alpha=_number(config, "lora_alpha", 8, path),
        rank_pattern={key: int(value) for key, value in _pattern(config, "rank_pattern", path, whole=True).items()},
        alpha_pattern=_pattern(config, "alpha_pattern", path),
        rslora=_flag(config, "use_rslora", path),
        fan_in_fan_out=_flag(config, "fan_in_fan_out", path),
        dora=_flag(config, "use_dora", path),
        keeps_ties=_flag(config, "ensure_weight_tying", path),
        modules_to_save=_names(config, "modules_to_save", path),
        target_parameters=_names(config, "target_parameters", path),
        base_model=str(config.get("base_model_name_or_path") or ""),
        initialisation=_initialisation(config, path),
    )


def _check_kind(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise InputError("is not the config of a PEFT adapter", where=f"{path}: peft_type", expected="LORA",
                         found=repr(kind), remedy="name a folder that peft wrote")  # fmt: skip
    if kind != "LORA":
        raise Unsupported(f"an adapter of type {kind} is not merged", where=f"{path}: peft_type", expected="LORA",
                          found=kind, remedy="merge it with peft, and give regraft the result")  # fmt: skip


def _refuse_options(config: Mapping[str, Any], path: Path) -> None:
    for key, value in config.items():
        if key in READ or key in WITHOUT_EFFECT or not value:
            continue
        reason = REFUSED.get(key, "regraft does not know this field, so it cannot tell what it changes")
        raise Unsupported(f"the adapter uses {key}: {reason}", where=f"{path}: {key}", found=_short(value),
                          remedy="merge it with peft, and give regraft the result")  # fmt: skip


def _initialisation(config: Mapping[str, Any], path: Path) -> str:
    value = config.get("init_lora_weights", True)
    if isinstance(value, bool) or value is None:
        return ""
    if not isinstance(value, str):
        raise InputError("is neither a name nor true or false", where=f"{path}: init_lora_weights", found=_short(value))
    if value.lower().startswith(_BASE_CHANGING):
        return value
    if value.lower() in {"gaussian", "eva", "orthogonal", "mica", "true", "false"}:
        return ""
    raise Unsupported("this initialisation is not known, so it may have changed the base weights",
                      where=f"{path}: init_lora_weights", found=value,
                      remedy="merge it with peft, and give regraft the result")  # fmt: skip


def _number(config: Mapping[str, Any], key: str, default: float, path: Path, *, whole: bool = False) -> float:
    value = config.get(key, default)
    _check_number(value, f"{path}: {key}", whole=whole)
    return float(value)


def _check_number(value: Any, where: str, *, whole: bool) -> None:
    kind = int if whole else (int, float)
    right = not isinstance(value, bool) and isinstance(value, kind) and abs(value) <= sys.float_info.max
    if not right or (whole and not 1 <= value <= _MAX_RANK):
        expected = f"a whole number from 1 to {_MAX_RANK}" if whole else "a finite number"
        raise InputError("is malformed", where=where, expected=expected, found=_short(value),
                         remedy="correct the adapter's config or fetch it again")  # fmt: skip


def _pattern(config: Mapping[str, Any], key: str, path: Path, *, whole: bool = False) -> dict[str, float]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise InputError("is malformed", where=f"{path}: {key}", expected="an object", found=type(patterns).__name__,
                         remedy="correct the adapter's config or fetch it again")  # fmt: skip
    for pattern, value in patterns.items():
        _check_number(value, f"{path}: {key}: {pattern}", whole=whole)
        if len(re.findall(r"[*+{]", pattern)) > _MAX_REPEATS or _REPEATED_GROUP.search(pattern):
            raise InputError("is a regular expression that could take for ever", where=f"{path}: {key}",
                             expected=f"at most {_MAX_REPEATS} repeats, none of a group", found=_short(pattern),
                             remedy="write a simpler pattern, or a name for each module")  # fmt: skip
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError("is not a regular expression", where=f"{path}: {key}", expected=error, found=pattern,
                             remedy="correct the adapter's config") from None  # fmt: skip
    return dict(patterns)


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """As peft reads them: the pattern must reach the end of the path and begin at its start or behind a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _flag(config: Mapping[str, Any], key: str, path: Path) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise InputError("is malformed", where=f"{path}: {key}", expected="true or false", found=_short(value),
                         remedy="correct the adapter's config or fetch it again")  # fmt: skip
    return value


def _names(config: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError("is malformed", where=f"{path}: {key}", expected="a list of names", found=_short(value),
                         remedy="correct the adapter's config or fetch it again")  # fmt: skip
    return tuple(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
