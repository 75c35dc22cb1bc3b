"""Targets: the formats of checkpoints, .safetensors with its index and config, bitsandbytes' and .gguf."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tests.fuzz import mutations
from tests.fuzz.contract import REFUSALS, target
from tests.fuzz.honest import base, document, of_base, put, scratch, variant


def small_safetensors() -> list[bytes]:
    from tests.checkpoints import entry, file_bytes

    return [
        file_bytes({"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}, bytes(32)),
        file_bytes({"__metadata__": {"format": "pt"}, "a": entry("U8", [], 0, 1), "b": entry("F8_E4M3", [0, 5], 1, 1)},
                   bytes(1)),
    ]  # fmt: skip


@target(mutations.mutated_safetensors, small_safetensors)
def header(data: bytes) -> object:
    """A .safetensors file by name."""
    from regraft.core.sources import open_checkpoint

    folder = variant("header", ".nothing")
    (folder / "config.json").write_bytes(b"{}")
    checkpoint = open_checkpoint(put(folder / "model.safetensors", data))
    return checkpoint.digest, checkpoint.config


@target(mutations.mutated_json, of_base("model.safetensors.index.json"))
def index(data: bytes) -> object:
    """The index of a sharded checkpoint."""
    from regraft.core.sources import open_checkpoint

    folder = variant("index")
    put(folder / "model.safetensors.index.json", data)
    return open_checkpoint(folder).specs


def configs() -> list[bytes]:
    from tests.families import CONFIGS

    own = json.loads((base() / "config.json").read_bytes())
    scaled = {
        **own,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }
    return [document(own), document(scaled), *(document({**own, "model_type": name}) for name in CONFIGS)]


STEPS: tuple[Mapping[str, Any], ...] = (
    {"use": "context-extension", "method": "yarn", "target_length": 4096},
    {"use": "prune", "score": "magnitude", "sparsity": 0.5},
    {"use": "fine-tune", "data": "rows.jsonl", "steps": 1},
)


@target(mutations.mutated_json, configs)
def config(data: bytes) -> object:
    """config.json of a checkpoint: opened, verified by structure, and planned on."""
    from regraft.core.host import host
    from regraft.core.plan import plan_step
    from regraft.core.recipe.load import recipe_from
    from regraft.core.sources import open_checkpoint
    from regraft.core.verify import check_structure

    folder = variant("config")
    put(folder / "config.json", data)
    checkpoint = open_checkpoint(folder)
    findings = check_structure(checkpoint, host().architectures())
    for step in STEPS:
        recipe = recipe_from({"base": {"model": str(folder)}, "steps": [dict(step)]}, scratch() / "recipe.toml", (),
                             host().transformations())  # fmt: skip
        try:
            plan_step(recipe.steps[0], checkpoint, host())
        except REFUSALS:
            continue
    return findings


def quantised() -> list[bytes]:
    from tests.checkpoints import entry, file_bytes

    state = document({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 16]})
    parts = {
        "a.weight": ("U8", [64, 1], bytes(64)),
        "a.weight.absmax": ("F32", [2], bytes(8)),
        "a.weight.quant_map": ("F32", [16], bytes(64)),
        "a.weight.quant_state.bitsandbytes__nf4": ("U8", [len(state)], state),
        "b.weight": ("I8", [2, 4], bytes(8)),
        "b.SCB": ("F32", [2], bytes(8)),
        "b.weight_format": ("U8", [], bytes(1)),
    }
    entries, blob = {}, b""
    for name, (dtype, shape, content) in parts.items():
        entries[name] = entry(dtype, shape, len(blob), len(blob) + len(content))
        blob += content
    return [file_bytes(entries, blob)]


@target(mutations.mutated_safetensors, quantised)
def bitsandbytes(data: bytes) -> object:
    """A quantised checkpoint, shown dequantised."""
    from regraft.core.sources import open_checkpoint

    folder = variant("bitsandbytes", ".nothing")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    put(folder / "model.safetensors", data)
    return open_checkpoint(folder).specs


@target(mutations.mutated_json, lambda: [quantised_state()])
def quant_state(data: bytes) -> object:
    """The state that bitsandbytes keeps beside a 4-bit weight."""
    from regraft.core.fourbit import parse_state

    return parse_state(data, "a.weight", nested=True).dump()


def quantised_state() -> bytes:
    return document({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 16],
                     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1})  # fmt: skip


def gguf_files() -> list[bytes]:
    from tests.core.gguf.binary import Binary
    from tests.core.gguf.writing import write_model
    from tests.families import tiny

    def vocabulary(kind: str) -> Callable[[Any], None]:
        def change(writer: Any) -> None:
            tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "<0x41>", *(f"t{n}" for n in range(3))]
            writer.add_tokenizer_model(kind)
            writer.add_token_list(tokens)
            writer.add_token_types([2, 3, 3, 1, 1, 1, 6, 1, 4, 5])
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
            writer.add_chat_template("{{ messages }}")
            if kind == "gpt2":
                writer.add_tokenizer_pre("llama-bpe")
                writer.add_token_merges(["a b"])
            else:
                writer.add_token_scores([0.0] * len(tokens))

        return change

    model = tiny("llama", vocab_size=16, hidden_size=8, intermediate_size=8, num_attention_heads=2,
                 num_key_value_heads=1, num_hidden_layers=1)  # fmt: skip
    files = [
        write_model(scratch() / f"seed-{kind}.gguf", model, change=vocabulary(kind)).read_bytes()
        for kind in ("gpt2", "llama")
    ]
    return [bytes(Binary()), *files]


@target(mutations.mutated_bytes, gguf_files)
def gguf(data: bytes) -> object:
    """A .gguf file: header, config and tokenizer."""
    from regraft.core.sources import open_checkpoint

    return open_checkpoint(put(scratch() / "model.gguf", data)).digest
