"""The config block, the modeling file and the tokenizer's new tokens: everything of the result that is no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.checkpoint import CONFIG, TOKENIZER_CONFIG, Checkpoint
from regraft.core.errors import InputError, Unsupported
from regraft.core.patch import Patch
from regraft.core.portable_code import CodePatch, code_patch, portable_code, read_template, refuse_other_code
from regraft.core.verify.structure import TOKENIZER
from regraft.plugins.fourier_head.families import PREFIX, StockFamily, family_of, setting
from regraft.plugins.fourier_head.params import FourierHeadParams
from regraft.plugins.fourier_head.select import Bins, select

MODULE = "modeling_fourier_head"
CLASS = "FourierHeadForCausalLM"
CONFIG_CLASS = "FourierHeadConfig"


@dataclass(frozen=True)
class Aim:
    """What is known before anything is computed.

    Args:
        family: of the stock class.
        architecture: where the tensors are.
        bins: the range of token ids.
        tied: whether text logits go on coming from the embeddings.
    """

    family: StockFamily
    architecture: Architecture
    bins: Bins
    tied: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, params: FourierHeadParams) -> Aim:
        """Look at headers, config and tokenizer.

        Raises:
            Unsupported: the head of this model cannot be replaced.
            InputError: embeddings or head are missing, or do not fit.
            UsageError, InputError: as `select`.
        """
        family = family_of(checkpoint.config)
        refuse_other_code(checkpoint)
        architecture = architecture_of(checkpoint.config, checkpoint.specs)
        stock = checkpoint.config.get("architectures") or [family.stock_class]
        if stock != [family.stock_class]:
            raise Unsupported(
                "the head is that of another model than the causal language model", where="config.json: architectures",
                expected=family.stock_class, found=", ".join(map(str, stock)),
                remedy="use a checkpoint of the causal language model",
            )  # fmt: skip
        rows = _tables(checkpoint, architecture)
        bins = select(checkpoint, params, rows)
        tied = architecture.tie_word_embeddings and not params.untie and params.mode == "hybrid"
        return cls(family, architecture, bins, tied)

    @property
    def embeddings(self) -> str:
        """Name of the embeddings."""
        return self.architecture.slot("embed_tokens").tensor

    @property
    def head(self) -> str:
        """Name of the tensor that makes the logits now; the embeddings where both are one."""
        return self.architecture.slot("lm_head").tensor


def _tables(checkpoint: Checkpoint, architecture: Architecture) -> int:
    """Rows of the embeddings, which the head has as well.

    Raises:
        InputError: one of them is missing, or they have different shapes.
    """
    embeddings, head = (checkpoint.tensor(architecture.slot(role).tensor).spec for role in ("embed_tokens", "lm_head"))
    if embeddings.shape != head.shape:
        raise InputError(
            "the head has another shape than the embeddings", where=f"{checkpoint.label}: {head.name}",
            expected=list(embeddings.shape), found=list(head.shape), remedy="fetch the checkpoint again",
        )  # fmt: skip
    return embeddings.rows


def block(aim: Aim, params: FourierHeadParams, config: Mapping[str, Any]) -> dict[str, Any]:
    """`fourier_head` of config.json."""
    bins = aim.bins
    softcap = setting(config, aim.family.softcap) if aim.family.softcap else None
    found = {
        "mode": params.mode,
        "start": bins.start,
        "bins": bins.count,
        "num_frequencies": params.num_frequencies,
        "quadrature": "exact" if params.exact else "midpoint",
        "coordinate": params.coordinate,
        "edges": None if bins.edges is None else list(bins.edges),
        "range": list(bins.range),
        "margin": params.margin,
        "floor": params.floor,
        "gate": params.gate,
        "tied": aim.tied,
        "softcap": softcap,
        "scale": logit_scale(aim, config),
    }
    return {key: value for key, value in found.items() if value is not None}  # a merge patch cannot hold null


def logit_scale(aim: Aim, config: Mapping[str, Any]) -> float:
    """What the stock class multiplies its logits by."""
    return aim.family.factor(setting(config, aim.family.scale)) if aim.family.scale else 1.0


def code(aim: Aim, config: Mapping[str, Any]) -> CodePatch:
    """The modeling file and the config keys under which transformers finds it."""
    model_type = f"{PREFIX}{config['model_type']}"
    literals = {
        "bins": aim.bins.count,
        "stock_class": aim.family.stock_class,
        "config_class": aim.family.config_class,
        "model_type": model_type,
        "neutral": aim.family.neutral(),
    }
    rendered = portable_code(read_template(__package__, f"{MODULE}.py.template"), literals)
    made = code_patch(MODULE, CLASS, rendered)
    auto_map = {**made.config["auto_map"], "AutoConfig": f"{MODULE}.{CONFIG_CLASS}"}
    return CodePatch(made.files, {**made.config, "auto_map": auto_map, "model_type": model_type})


def without_tensors(checkpoint: Checkpoint, aim: Aim, params: FourierHeadParams) -> Patch:
    """The patch without its edits."""
    written = code(aim, checkpoint.config)
    config = {
        **written.config,
        "fourier_head": block(aim, params, checkpoint.config),
        "tie_word_embeddings": aim.tied,
        "vocab_size": aim.bins.vocab_size,
    }
    if params.series is not None:
        config["time_series"] = params.series.block
    if checkpoint.config.get("auto_map"):
        config["auto_map"] = {**checkpoint.config["auto_map"], **config["auto_map"]}
    stored = {"lm_head.weight", "embed_out.weight", aim.head} & set(checkpoint.specs)
    kept = {aim.embeddings} | ({"lm_head.weight"} if params.mode == "hybrid" and not aim.tied else set())
    return Patch(
        removals=frozenset(stored - kept),
        json={CONFIG: config, **(_new_tokens(checkpoint, aim.bins) if aim.bins.appended else {})},
        files=dict(written.files),
    )


def _new_tokens(checkpoint: Checkpoint, bins: Bins) -> dict[str, Mapping[str, Any]]:
    """The bins among the added tokens of the tokenizer."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    new = {bins.start + number: {"content": text, **flags} for number, text in enumerate(bins.texts)}
    before = checkpoint.json(TOKENIZER).get("added_tokens") or []
    found: dict[str, Mapping[str, Any]] = {
        TOKENIZER: {"added_tokens": [*before, *({"id": index, **token} for index, token in new.items())]}
    }
    if "added_tokens_decoder" in checkpoint.json(TOKENIZER_CONFIG):
        found[TOKENIZER_CONFIG] = {"added_tokens_decoder": {str(index): token for index, token in new.items()}}
    return found
