"""Plan and apply: policy.json, runtime.py and what the composer needs; no tensor and no tokenizer changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.data.load import check_sources
from regraft.core.errors import TransformationError, Unsupported
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import Run
from regraft.core.verify.structure import TOKENIZER
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.dynamic.network import carried_network, network_bytes
from regraft.plugins.tokenizer_retrofit.dynamic.params import DynamicTokenizationParams
from regraft.plugins.tokenizer_retrofit.dynamic.table import embeddings_of, make_table
from regraft.plugins.tokenizer_retrofit.portable import DYNAMIC, runtime
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

if TYPE_CHECKING:
    import torch

    from regraft.plugins.tokenizer_retrofit.dynamic.curve import Curve

FOLDER = "dynamic_tokenization"
POLICY, RUNTIME, TABLE = f"{FOLDER}/policy.json", f"{FOLDER}/runtime.py", f"{FOLDER}/composer.safetensors"
REPORT = "reduction.png"

_DECODERS = ("ForCausalLM", "LMHeadModel")
_PROBES = ("The 12 words of 2026, it's said:\n\n\tdon't!", "Ünïcödé, naïve cafés and 猫 🙂", "  two  blanks ")


def check(checkpoint: Checkpoint, params: DynamicTokenizationParams) -> None:
    """Refuse what headers, config and tokenizer.json show to be impossible."""
    old = TokenizerFile.of(checkpoint)
    refuse_layers(checkpoint)
    if params.composer != "mean":
        embeddings_of(checkpoint, old)
    if params.corpus is not None:
        check_sources(params.corpus)


def refuse_layers(checkpoint: Checkpoint) -> None:
    """Refuse models that read ids beside embeddings.

    Raises:
        Unsupported: the model looks tokens up in every layer.
    """
    text = checkpoint.config.get("text_config", checkpoint.config)
    if text.get("hidden_size_per_layer_input"):
        raise Unsupported(
            "the model looks tokens up in every layer, so an embedding alone cannot stand for one",
            where="config.json: hidden_size_per_layer_input", found=text["hidden_size_per_layer_input"],
            remedy="use tokenizer-retrofit on another model",
        )  # fmt: skip


def outline(checkpoint: Checkpoint, params: DynamicTokenizationParams) -> Outline:
    """Which files come; the policy's size and the table's are known after the run."""
    files: dict[str, int | None] = {POLICY: None, RUNTIME: len(runtime(DYNAMIC))}
    memory = 0
    if params.composer == "table":
        files[TABLE] = None
        memory = 4 * checkpoint.specs[embeddings_of(checkpoint, TokenizerFile.of(checkpoint))].nbytes
    if params.hypernet is not None:
        files[TABLE] = None
        memory = 2 * network_bytes(params.hypernet)
    notes = ("weights and tokenizer stay as they are",)
    return Outline(files=files, dropped=_dropped(checkpoint, params), notes=notes, workspace_bytes=memory)


def apply(checkpoint: Checkpoint, params: DynamicTokenizationParams, run: Run) -> Patch:
    """The files, and what they do to the corpus.

    Raises:
        InputError: the corpus is empty, no text, or has nothing to merge; the hypernetwork is for another model.
        TransformationError: transformers cuts texts otherwise than tokenizer.json says.
    """
    old = TokenizerFile.of(checkpoint)
    check_cut(old, run.tokenizer(checkpoint))
    policy = _policy(checkpoint, old, params)
    made = _Measured()
    if params.corpus is not None:
        made = _measured(old, policy, params, run)
    policy |= {"merges": params.merges if params.merges is not None else made.merges, "reductions": made.reductions}
    network: dict[str, torch.Tensor] = {}
    if params.hypernet is not None:
        policy["hypernet"], network = carried_network(checkpoint, old, params.hypernet)
    files = {POLICY: FileRef(data=(json.dumps(policy, indent=1, sort_keys=True) + "\n").encode()),
             RUNTIME: FileRef(data=runtime(DYNAMIC))}  # fmt: skip
    figures: dict[str, Any] = {"merges": policy["merges"], **made.figures(policy["merges"])}
    if params.composer == "table":
        table = make_table(checkpoint, old, params, run)
        files[TABLE] = FileRef(data=_safetensors(table))
        figures["table_rows"] = len(table["rows"])
    if network:
        files[TABLE] = FileRef(data=_safetensors(network))
    if params.corpus is not None:
        figures["corpus"] = Corpus(params.corpus).summary()
    return Patch(
        files=files,
        dropped=_dropped(checkpoint, params),
        metrics=figures,
        notes=("weights and tokenizer stay as they are",),
        reports=made.reports,
    )


@dataclass(frozen=True)
class _Measured:
    """What the corpus says; nothing without one."""

    curve: Curve | None = None
    merges: int = 0
    reports: Mapping[str, FileRef] = field(default_factory=dict)

    @property
    def reductions(self) -> list[list[float]]:
        """Rows of the policy's table."""
        return [] if self.curve is None else self.curve.table()

    def figures(self, merges: int) -> dict[str, Any]:
        """The reduction by so many merges, and the share of tokens that they save."""
        if self.curve is None:
            return {}
        return {"reduction": round(self.curve.reduction(merges), 6), "saved": round(self.curve.shorter(merges), 6)}


def _measured(old: TokenizerFile, policy: dict[str, Any], params: DynamicTokenizationParams, run: Run) -> _Measured:
    from regraft.plugins.tokenizer_retrofit.dynamic.curve import measure, plot

    assert params.corpus is not None
    run.tell("how far merges shorten the corpus")
    texts = Corpus(params.corpus, params.corpus_bytes).texts()
    curve = measure(old, policy, texts, batch_size=params.batch_size, seed=run.seed_for("passages"))
    merges = 0 if params.reduction is None else curve.merges_for(params.reduction)
    return _Measured(curve, merges, {REPORT: FileRef(data=plot(curve, policy))})


def _policy(checkpoint: Checkpoint, old: TokenizerFile, params: DynamicTokenizationParams) -> dict[str, Any]:
    """What the runtime goes by, but for the number of merges."""
    pad = checkpoint.config.get("pad_token_id")
    return {
        "format": 1,
        "boundary": params.boundary,
        "scope": params.scope,
        "target_reduction": params.reduction,
        "min_count": params.min_count,
        "max_token_bytes": params.max_token_bytes,
        "composer": params.composer,
        "padding": _padding(checkpoint) if params.padding == "auto" else params.padding,
        "pad_token_id": pad if isinstance(pad, int) and pad >= 0 else 0,
        "spelling": old.spelling,
        "unknown": old.unknown,
        "tokenizer_sha256": checkpoint.files[TOKENIZER].sha256(),
    }


def _padding(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures") or ()
    return "left" if any(str(name).endswith(_DECODERS) for name in names) else "right"


def _dropped(checkpoint: Checkpoint, params: DynamicTokenizationParams) -> dict[str, str]:
    gone = TABLE in checkpoint.files and params.composer == "mean"
    return {TABLE: "the new policy has no table"} if gone else {}


def check_cut(old: TokenizerFile, stock: Any) -> None:
    """The runtime reads tokenizer.json; the model has learnt from what transformers makes of it.

    Raises:
        TransformationError: the two cut a text in different ways.
    """
    plain = old.backend()
    for probe in _PROBES:
        wanted, found = plain.encode(probe).ids, stock(probe)["input_ids"]
        if found != wanted:
            raise TransformationError(
                "transformers cuts a text otherwise than tokenizer.json says", where=repr(probe), expected=wanted[:20],
                found=found[:20], remedy=f"its class is {type(stock).__name__}: see tokenizer_class and model_type",
            )  # fmt: skip


def _safetensors(table: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(dict(table), metadata={"format": "pt"})
