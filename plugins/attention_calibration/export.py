"""How a checkpoint carries calibration: settings and heads in config.json, one modeling file, weights as they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.head_file import Head
from regraft.core.jsonio import difference
from regraft.core.patch import Patch
from regraft.core.portable_code import code_patch, portable_code, read_template
from regraft.plugins.attention_calibration.families import Family
from regraft.plugins.attention_calibration.params import AttentionCalibrationParams

MODULE = "modeling_attention_calibration"
CLASS = "AttentionCalibrationForCausalLM"
ACT = "act"
_KERNEL = "calibrated_attention_chunked.py"

LOADING = "load with trust_remote_code=True; without it transformers refuses, rather than dropping the calibration"


def settings(params: AttentionCalibrationParams) -> dict[str, Any]:
    """The `act` block of config.json but for its heads."""
    return {
        "version": 1,
        "beta": params.beta,
        "tau": params.threshold,
        "tau_mode": params.tau_mode,
        "scope": params.scope,
        "min_queries": params.min_queries,
        "spare_first": params.spare_first,
    }


def export(checkpoint: Checkpoint, family: Family, params: AttentionCalibrationParams, heads: Iterable[Head]) -> Patch:
    """The patch that calibrates `heads`; it changes config.json and adds the modeling file.

    The file is the torch kernel as it ships with regraft, and behind it what puts it into the model.
    """
    table: dict[str, list[int]] = {}
    for layer, head in sorted(heads):
        table.setdefault(str(layer), []).append(head)
    model_type = str(checkpoint.config["model_type"])
    prefix = f"regraft_attention_calibration_{model_type}_"
    template = read_template("regraft.kernels", _KERNEL) + read_template(__package__, f"{MODULE}.py.template")
    literals = {
        "prefix": prefix,
        "renamed": dict(family.renamed) or None,
        "stock_class": family.stock,
    }
    code = code_patch(
        MODULE, CLASS, portable_code(template, literals), attn_implementation=f"{prefix}{family.attention}"
    )
    auto_map = {**(checkpoint.config.get("auto_map") or {}), **code.config["auto_map"]}
    config = {**checkpoint.config, **code.config, "auto_map": auto_map, ACT: {**settings(params), "heads": table}}
    return Patch(json={CONFIG: difference(checkpoint.config, config)}, files=dict(code.files))
