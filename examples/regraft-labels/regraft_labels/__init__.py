"""Decoders as sequence labellers (Dukic and Snajder 2024, arXiv 2401.14556) as a regraft plugin.

The head over the vocabulary makes way for one over labels, read at the first token of every word. `code` says which
groups of layers lose their causal mask, one digit a group, the first for the lowest layers: the paper searches 0000 to
1111. Without an unlocked layer stock transformers loads the result; with one it needs the code in the checkpoint.

Deviation: the paper fine-tunes the body too, with QLoRA. Here the head alone is fitted, to the end, on the states of
the body as it is: a start for such a fine-tune, and a baseline for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field

from regraft import (
    Checkpoint,
    Edit,
    LazyTensor,
    MemoryTensor,
    Outline,
    Params,
    Patch,
    PromisedTensor,
    Run,
    TensorSpec,
    Transformation,
    Unsupported,
    UsageError,
    Value,
    architecture_of,
    code_patch,
    hookimpl,
)

regraft_api = ">=1,<2"

STOCK = {
    "llama": "LlamaForTokenClassification",
    "mistral": "MistralForTokenClassification",
    "qwen2": "Qwen2ForTokenClassification",
    "qwen3": "Qwen3ForTokenClassification",
}
MODULE = "modeling_unlocked"
ATTENTION = "regraft_unlocked_sdpa"


class LabelsParams(Params):
    """Parameters of `labels`."""

    labels: list[str] = Field(min_length=2, description="The labels, in the order of their numbers.")
    data: Path = Field(description='JSON lines, each {"tokens": ["EU", "rejects"], "labels": ["B-ORG", "O"]}.')
    code: str = Field("0", pattern="^[01]+$", description="Groups of layers, lowest first: 1 sees what follows.")
    held_out: float = Field(
        0.1, gt=0, lt=1, description="Share of the sentences, the last ones, that measure the head."
    )
    decay: float = Field(1e-3, ge=0, description="L2 penalty of the head's weight.")


class Labels(Transformation[LabelsParams]):
    """Replaces the head, and unlocks layers."""

    name = "labels"
    summary = "Turn a decoder into a sequence labeller, with the causal mask taken off some layers."
    paper = "Dukic and Snajder 2024, arXiv 2401.14556"
    loads_with = "stock transformers; with unlocked layers: with trust_remote_code=True"
    Params = LabelsParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters that work on a tiny model, for `regraft plugins check`."""
        del checkpoint
        words = ["red", "stone", "blue", "leaf", "green", "hill"]
        rows = [{"tokens": words[at:] + words[:at], "labels": (["ADJ", "N"] * 4)[at % 2 :][:6]} for at in range(6)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"labels": ["ADJ", "N"], "data": str(folder / "rows.jsonl")}

    def check(self, checkpoint: Checkpoint, params: LabelsParams) -> None:
        """Refuse other families, codes longer than the model, and sentences that cannot be read.

        Raises:
            Unsupported: a model type without such a class here, or a checkpoint with code of its own.
            UsageError: labels that repeat, or more groups than layers.
            InputError: the sentences are not valid.
        """
        from regraft_labels.rows import read_sentences

        model_type = checkpoint.config.get("model_type")
        if model_type not in STOCK:
            raise Unsupported(
                "the family has no such class here", where="config.json: model_type", expected=", ".join(STOCK),
                found=model_type, remedy="convert a checkpoint of one of those",
            )  # fmt: skip
        if "auto_map" in checkpoint.config:
            raise Unsupported(
                "the checkpoint brings code of its own", where="config.json: auto_map",
                remedy="start from the checkpoint before that code was added",
            )  # fmt: skip
        if len(set(params.labels)) < len(params.labels):
            raise UsageError("a label stands twice", where="labels", found=", ".join(params.labels))
        layers = architecture_of(checkpoint.config, checkpoint.specs).num_layers
        if len(params.code) > layers:
            raise UsageError("more groups than layers", where="code", expected=f"at most {layers}", found=params.code)
        read_sentences(params.data, params.labels)

    def plan(self, checkpoint: Checkpoint, params: LabelsParams) -> Outline:
        """Two tensors for one, and a config of another class."""
        return Outline.of(
            self._patch(checkpoint, params, *(PromisedTensor(spec) for spec in _specs(checkpoint, params)))
        )

    def apply(self, checkpoint: Checkpoint, params: LabelsParams, run: Run) -> Patch:
        """Read the sentences with the layers unlocked, fit the head."""
        import torch

        from regraft_labels.fit import fit_head, word_states
        from regraft_labels.modeling_unlocked import unlock
        from regraft_labels.rows import read_sentences

        sentences = read_sentences(params.data, params.labels)
        model, tokenizer = run.model(checkpoint), run.tokenizer(checkpoint)
        unlock(model.model, unlocked(params.code, len(model.model.layers)))
        states = [word_states(model.model, tokenizer, sentence, run.device) for sentence in sentences]
        number = {label: index for index, label in enumerate(params.labels)}
        labels = [torch.tensor([number[label] for label in sentence.labels]) for sentence in sentences]
        train = len(sentences) - max(1, int(params.held_out * len(sentences)))
        weight, bias = fit_head(torch.cat(states[:train]), torch.cat(labels[:train]), len(number), params.decay)
        guessed = (torch.cat(states[train:]).double() @ weight.T + bias).argmax(-1)
        right = torch.cat(labels[train:])
        usual = torch.cat(labels[:train]).mode().values
        patch = self._patch(checkpoint, params, MemoryTensor("score.weight", weight), MemoryTensor("score.bias", bias))
        metrics = {
            "sentences": len(sentences),
            "held_out_words": len(right),
            "held_out_accuracy": float((guessed == right).double().mean()),
            "accuracy_of_the_commonest_label": float((right == usual).double().mean()),
        }
        return Patch(**{**vars(patch), "metrics": metrics})

    def _patch(self, checkpoint: Checkpoint, params: LabelsParams, weight: LazyTensor, bias: LazyTensor) -> Patch:
        model_type = str(checkpoint.config["model_type"])
        layers = unlocked(params.code, architecture_of(checkpoint.config, checkpoint.specs).num_layers)
        config: dict[str, Any] = {
            "architectures": [STOCK[model_type]],
            "id2label": {str(index): label for index, label in enumerate(params.labels)},
            "label2id": {label: index for index, label in enumerate(params.labels)},
        }
        code = None
        if layers:
            text = files("regraft_labels").joinpath(f"{MODULE}.py").read_bytes()
            code = code_patch(
                MODULE, f"Unlocked{STOCK[model_type]}", text, attn_implementation=ATTENTION,
                auto_class="AutoModelForTokenClassification",
            )  # fmt: skip
            config |= {**code.config, "bidirectional_layers": layers, "use_cache": False}
        specs = _specs(checkpoint, params)
        return Patch(
            edits={spec.name: Edit(spec, Value(tensor)) for spec, tensor in zip(specs, (weight, bias), strict=True)},
            removals=frozenset({"lm_head.weight"} & set(checkpoint.specs)),
            json={"config.json": config},
            files=code.files if code else {},
            notes=(f"layers that see what follows: {', '.join(map(str, layers)) or 'none'}",),
        )


def unlocked(code: str, layers: int) -> list[int]:
    """The layers whose group has a 1; groups are as equal as can be, larger ones first."""
    size, rest = divmod(layers, len(code))
    sizes = [size + (group < rest) for group in range(len(code))]
    digits = "".join(digit * count for digit, count in zip(code, sizes, strict=True))
    return [layer for layer, digit in enumerate(digits) if digit == "1"]


def _specs(checkpoint: Checkpoint, params: LabelsParams) -> tuple[TensorSpec, TensorSpec]:
    architecture = architecture_of(checkpoint.config, checkpoint.specs)
    dtype = checkpoint.specs[architecture.slot("final_norm").tensor].dtype
    count = len(params.labels)
    return (
        TensorSpec("score.weight", dtype, (count, architecture.hidden_size)),
        TensorSpec("score.bias", dtype, (count,)),
    )


@hookimpl
def regraft_transformations() -> list[type[Transformation[LabelsParams]]]:
    """Our transformation."""
    return [Labels]
