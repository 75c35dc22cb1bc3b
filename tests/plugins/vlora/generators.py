"""Tiny generators for tiny models, and what a model puts out while their deltas are added by hooks."""

from __future__ import annotations

import json
import zlib
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file

from regraft.core.architectures import architecture_of
from regraft.core.patch import overlay
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.plugins.vlora import Vlora
from regraft.plugins.vlora.folder import save_generator
from regraft.plugins.vlora.generator import new_generator
from regraft.plugins.vlora.params import VloraParams
from regraft.plugins.vlora.settings import settings_for

PATCHES, WIDTH = 4, 12
SIZES = {"dim": 16, "depth": 2, "heads": 2, "visual_dim": WIDTH, "pos_num": PATCHES, "rank": 3, "alpha": 6.0}


def trained(settings, seed=0):
    """A generator whose B are not zero."""
    generator = new_generator(settings, seed)
    with torch.no_grad():
        for name, parameter in generator.B.items():
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
        for name, parameter in generator.named_parameters():
            if "weights_head" in name and name.endswith("bias"):
                random = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return generator.requires_grad_(False).eval()


def make_generator(base: Path, folder: Path, *, zero=False, **options):
    """Write a generator for the checkpoint `base`; gives it."""
    checkpoint = open_folder(base, label="base")
    architecture = architecture_of(checkpoint.config, checkpoint.specs)
    settings = settings_for(architecture, **{"skip_layers": 2, **SIZES, **options})
    generator = new_generator(settings, 0) if zero else trained(settings)
    save_generator(generator, folder)
    return generator.requires_grad_(False).eval()


def features(seed=0, count=1):
    """[count, patches, width]."""
    return torch.randn(count, PATCHES, WIDTH, generator=torch.Generator().manual_seed(seed))


def save_features(path: Path, tensors=None) -> Path:
    save_file(tensors if tensors is not None else {"image": features()[0]}, path)
    return path


def vlora(base: Path, generator: Path, tmp_path: Path, **params):
    """The patch, and the checkpoint seen through it; checked against the plan."""
    if not {"image", "images", "features"} & set(params):
        params["features"] = save_features(tmp_path / "features.safetensors")
    checkpoint = open_folder(base, label="base")
    given = VloraParams(generator=generator, **params)
    step = Vlora()
    outline = step.plan(checkpoint, given)
    patch = step.apply(checkpoint, given, Run("vlora"))
    assert not outline.deviations(patch)
    return patch, overlay(checkpoint, patch, by="vlora")


def hooked_logits(model, generator, seen, tokens, parts):
    """Logits with the deltas of `seen` features added by hooks.

    Args:
        parts: from a layer and a type to the module that the delta is beside, and the slice of its output.
    """
    dtype = next(model.parameters()).dtype
    pairs = {key: (A.sum(0).to(dtype), B.to(dtype)) for key, (A, B) in generator(seen).items()}

    def adding(A, B, where):
        def hook(module, inputs, kwargs, output):
            x = inputs[0] if inputs else kwargs["hidden_states"]
            output = output.clone()
            output[..., where] += generator.scale * (x @ A) @ B.T
            return output

        return hook

    with ExitStack() as stack, torch.no_grad():
        for (letter, layer), (A, B) in pairs.items():
            module, where = parts(model, layer, letter)
            stack.callback(module.register_forward_hook(adding(A, B, where), with_kwargs=True).remove)
        return model(tokens).logits


def llama_parts(model, layer, letter):
    block = model.model.layers[layer]
    return (block.mlp if letter == "m" else getattr(block.self_attn, f"{letter}_proj")), slice(None)


def gpt2_parts(model, layer, letter):
    attention = model.transformer.h[layer].attn
    if letter == "o":
        return attention.c_proj, slice(None)
    start = 64 * "qkv".index(letter)
    return attention.c_attn, slice(start, start + 64)


def edit_json(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
