"""Adapters made by peft, and what peft makes of them: the oracle of these tests."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import overlay
from regraft.core.sources.folder import open_folder
from regraft.plugins.lora_merge import LoraMerge
from regraft.plugins.lora_merge.params import LoraMergeParams


def load_model(folder: Path, **options: Any) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager", **options).eval()


def make_adapter(base: Path, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """An adapter for the model in `base` as peft saves it, with every tensor that it trains filled at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_model(base), LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
        generator = torch.Generator().manual_seed(seed)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    noise = torch.randn(parameter.shape, generator=generator)
                    size = 1.0 + 0.1 * noise if "magnitude" in name else 0.1 * noise
                    parameter.copy_(parameter * size if "magnitude" in name else size)
        model.save_pretrained(folder)
    if dtype != torch.float32:
        recast(folder, dtype)
    return folder


def recast(folder: Path, dtype: torch.dtype) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def merged_by_peft(base: Path, *adapters: Path, untied: bool = False) -> dict[str, torch.Tensor]:
    """The tensors that peft saves after merging; `untied` as peft's documentation advises for tied models."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")
        model = load_model(base)
        if untied:
            untie(model)
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        model.save_pretrained(scratch)
        return {name: tensor.clone() for name, tensor in load_file(Path(scratch) / "model.safetensors").items()}


def untie(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def adapted_logits(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the model with the adapter beside the weights, not merged."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_model(base), adapter).eval()(input_ids=ids).logits


def merged_by_us(base: Path | Checkpoint, adapter: Path, **params: Any) -> Checkpoint:
    below = open_folder(base, label="base") if isinstance(base, Path) else base
    transformation = LoraMerge()
    options = LoraMergeParams(adapter=adapter, **params)
    transformation.check(below, options)
    return overlay(below, transformation.patch(below, options), by="lora-merge")


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.load() for name, tensor in checkpoint.tensors.items()}


def roundings_apart(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """The largest difference, in units of the last place of the dtype at the size of the tensor's larger entry."""
    assert set(ours) == set(theirs)
    worst = 0.0
    for name, mine in ours.items():
        other = theirs[name]
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape), name
        difference = (mine.double() - other.double()).abs()
        size = torch.maximum(mine.double().abs(), other.double().abs()).clamp_min(0.125)
        worst = max(worst, float((difference / (size * torch.finfo(mine.dtype).eps)).max()))
    return worst
