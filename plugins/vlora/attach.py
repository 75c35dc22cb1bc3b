"""`output = "attached"`: generator and encoder in the checkpoint, with code that adds deltas while the model runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from regraft.core.architectures import Architecture, Family
from regraft.core.architectures.families import built_in
from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.operations import Value
from regraft.core.patch import Edit, Patch, Renamed
from regraft.core.portable_code import code_patch, portable_code, read_template, refuse_other_code
from regraft.core.tensors import LazyTensor
from regraft.plugins.vlora.eyes import eye_settings, eye_tensors, processor_files, replaced_files
from regraft.plugins.vlora.settings import ROLES, GeneratorSettings
from regraft.plugins.vlora.vision import Tower

MODULE, CLASS, CONFIG_CLASS = "modeling_vlora", "VloraForCausalLM", "VloraConfig"

TYPE = "vlora_"
"""What the `model_type` of the result begins with: stock transformers knows none, and refuses."""

TENSORS = "vlora."

_STOCK_CLASS = re.compile(r"[A-Za-z0-9]{1,64}(ForCausalLM|LMHeadModel)", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)


def attached(
    checkpoint: Checkpoint, architecture: Architecture, settings: GeneratorSettings, types: str,
    tensors: Mapping[str, LazyTensor], scale: float, eyes: Tower | None = None,
) -> Patch:  # fmt: skip
    """The patch: the generator's tensors, the places of its deltas in config.json, the code, and what it sees with.

    Args:
        checkpoint: of the language model.
        architecture: its roles.
        settings: of the generator.
        types: whose deltas are added.
        tensors: of the generator, by the names of `settings.shapes()`.
        scale: s.
        eyes: the vision encoder that goes along; without one the model takes features alone.

    Raises:
        InputError: the encoder has no image processor.
        Unsupported: a mixture of experts, a model with code of its own, or of no stock class.
    """
    refuse_other_code(checkpoint)
    stock = _stock_class(checkpoint, architecture)
    model_type = TYPE + architecture.model_type
    literals = {
        "patches": settings.pos_num, "width": settings.visual_dim, "stock_class": stock,
        "stock_type": architecture.model_type, "model_type": model_type,
    }  # fmt: skip
    code = code_patch(MODULE, CLASS, portable_code(read_template(__package__, f"{MODULE}.py.template"), literals))
    auto_map = {**code.config["auto_map"], "AutoConfig": f"{MODULE}.{CONFIG_CLASS}"}
    block = _block(settings, _places(architecture, settings, types), scale)
    files, dropped = dict(code.files), {}
    if eyes is not None:
        tensors = {**tensors, **eye_tensors(eyes)}
        block |= eye_settings(eyes)
        files |= processor_files(eyes)
        dropped = dict(replaced_files(checkpoint))
    edits = {}
    for name, tensor in tensors.items():
        own = Renamed(TENSORS + name, tensor)
        edits[own.spec.name] = Edit(own.spec, Value(own))
    config = {**code.config, "auto_map": auto_map, "model_type": model_type, "vlora": block}
    return Patch(edits=edits, json={CONFIG: config}, files=files, dropped=dropped)


def families() -> Sequence[Family]:
    """Rows for models with a generator attached, so that every command knows their tensors."""
    return [replace(row, model_type=TYPE + row.model_type, name=f"{row.label} with a generator of weights",
                    beside=(*row.beside, TENSORS)) for row in built_in().values() if _plain(row)]  # fmt: skip


def _plain(row: Family) -> bool:
    """Whether its stock class reads tensors under their own names: transformers renames and fuses others by the name of
    the model type, which the result has not."""
    return not row.nested and not any(part.per_expert or part.stored for part in row.parts)


def _stock_class(checkpoint: Checkpoint, architecture: Architecture) -> str:
    known = [name for name, row in built_in().items() if _plain(row)]
    if architecture.model_type not in known:
        raise Unsupported(
            "a generator cannot be attached to this family", where="config.json: model_type",
            expected=", ".join(known), found=architecture.model_type, remedy='bake an image in with output = "merged"',
        )  # fmt: skip
    names = checkpoint.config.get("architectures") or ["none"]
    if len(names) != 1 or not isinstance(names[0], str) or not _STOCK_CLASS.fullmatch(names[0]):
        raise Unsupported(
            "the model is no causal language model of a stock class", where="config.json: architectures",
            expected="one class, such as LlamaForCausalLM", found=", ".join(map(ascii, names)),
            remedy="use a checkpoint of the causal language model",
        )  # fmt: skip
    return str(names[0])


def _places(architecture: Architecture, settings: GeneratorSettings, types: str) -> dict[str, Any]:
    found = {}
    for layer in settings.active_layers:
        for letter in types:
            slot = architecture.slot(ROLES.get(letter, "down_proj"), layer)
            assert slot.module is not None, "the stock classes of the table have a module for every projection"
            place: dict[str, Any] = {"module": slot.module}
            if letter not in ROLES:
                place["module"] = slot.module.rpartition(".")[0]
            elif not slot.whole:
                place["rows"] = [[run.start, run.stop] for run in slot.rows]
            found[f"{letter}.{layer}"] = place
    return found


def _block(settings: GeneratorSettings, places: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """`vlora` of config.json; no path of the machine that the generator was trained on."""
    keys = ("dim", "depth", "heads", "visual_dim", "pos_num", "rank", "types", "weights_sep", "inputs", "outputs",
            "select_layer")  # fmt: skip
    block = {key: getattr(settings, key) for key in keys}
    if settings.vision_tower is not None and _HUB_ID.fullmatch(settings.vision_tower):
        block["vision_tower"] = settings.vision_tower
    return {**block, "ffn_size": settings.ffn_size, "layers": list(settings.active_layers), "scale": scale,
            "places": dict(places)}  # fmt: skip
