"""Targets: adapters and other small weights that steps take, and the heads that they are for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.fuzz import mutations
from tests.fuzz.contract import target
from tests.fuzz.honest import base, document, put, scratch


def adapter_files(name: str) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        return [(adapter() / name).read_bytes()]

    return seeds


@cache
def adapter() -> Path:
    from tests.adapters import write_adapter

    return write_adapter(scratch() / "adapter", modules=("self_attn.q_proj", "mlp.up_proj"), layers=1,
                         shapes={"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, 64),
                                 "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (64, 2),
                                 "base_model.model.model.norm.weight": (64,)},
                         rank_pattern={"^.*q_proj": 2}, alpha_pattern={"up_proj": 3.5}, modules_to_save=["norm"],
                         target_modules=["q_proj"], lora_dropout=0.0, bias="none")  # fmt: skip


def _merged(folder: Path) -> object:
    """The plan of merging the adapter in `folder`."""
    from regraft.core.sources import open_checkpoint
    from regraft.plugins.lora_merge import LoraMerge
    from regraft.plugins.lora_merge.params import LoraMergeParams

    params, checkpoint = LoraMergeParams.model_validate({"adapter": folder}), open_checkpoint(base())
    LoraMerge().check(checkpoint, params)
    return LoraMerge().plan(checkpoint, params)


@cache
def adapter_copy(name: str) -> Path:
    import shutil

    return Path(shutil.copytree(adapter(), scratch() / name))


@target(mutations.mutated_json, adapter_files("adapter_config.json"))
def adapter_config(data: bytes) -> object:
    """adapter_config.json of a PEFT adapter, planned onto a base."""
    folder = adapter_copy("adapter-of-config")
    put(folder / "adapter_config.json", data)
    return _merged(folder)


@target(mutations.mutated_safetensors, adapter_files("adapter_model.safetensors"))
def adapter_weights(data: bytes) -> object:
    """The weights of a PEFT adapter, planned onto a base."""
    folder = adapter_copy("adapter-of-weights")
    put(folder / "adapter_model.safetensors", data)
    return _merged(folder)


def heads_files() -> list[bytes]:
    return [document({"site": "head", "heads": [[0, 1], [1, 0]], "scoring": "scale", "num_layers": 2, "num_heads": 4,
                      "scores": [[0.1, None], [0.2, 0.3]]})]  # fmt: skip


@target(mutations.mutated_json, heads_files)
def heads(data: bytes) -> object:
    """heads.json."""
    from regraft.core.head_file import read_head_file

    return read_head_file(put(scratch() / "heads.json", data)).as_bytes()


def vector_files() -> list[bytes]:
    from tests.checkpoints import entry, file_bytes

    entries = {"layers.0.attn_out": entry("F32", [4], 0, 16), "layers.1.heads.2": entry("BF16", [8], 16, 32)}
    return [file_bytes(entries, bytes(32))]


@target(mutations.mutated_safetensors, vector_files)
def vectors(data: bytes) -> object:
    """Steering vectors."""
    from regraft.plugins.steer.vectors import read_vectors

    return read_vectors(put(scratch() / "vectors.safetensors", data), 1.0)
