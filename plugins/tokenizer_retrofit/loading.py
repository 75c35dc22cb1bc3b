"""The model of a checkpoint in the class that its config names, whatever its head: what a proof runs.

Trainings take `Run.model`, which knows classes that predict tokens alone and refuses tensors that the class does not
know. Here an encoder, a classifier or a body without a head is run as it is, and tensors that the class leaves alone
before and after are no fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import InputError, RegraftError, Unsupported, first_line
from regraft.core.training.model import memory, quiet, set_generation, side_folder, state_of
from regraft.core.transformation import Run


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model, in fp32 and eval mode.

    Args:
        model: of transformers.
        unknown: tensors that its class does not know.
    """

    model: Any
    unknown: frozenset[str]


def load(checkpoint: Checkpoint, run: Run, *, causal: bool) -> Loaded:
    """The model as config.json names it; of the checkpoint's own code where it has some for language models.

    Args:
        checkpoint: whose.
        run: the run.
        causal: without a class that transformers knows by name, whether to take that which predicts the next token,
            rather than the body alone.

    Raises:
        Unsupported: there is no class, or it cannot be built.
        InputError: config.json is none that transformers reads, or the class has tensors that the checkpoint lacks or
            has in other shapes.
        ResourceError: not enough memory.
    """
    own = [key for key in checkpoint.config.get("auto_map") or {} if key.startswith("AutoModel")]
    if "AutoModelForCausalLM" in own:
        return Loaded(run.model(checkpoint), frozenset())
    if own:
        raise Unsupported("its own code has no class that predicts the next token", where=checkpoint.label, found=own)
    with side_folder(checkpoint) as folder, quiet():
        try:
            model, info = _build(checkpoint, folder, causal)
        except RegraftError:
            raise
        except Exception as error:  # transformers raises what it likes here
            raise Unsupported("transformers cannot build the model", where=checkpoint.label, found=first_line(error),
                              remedy="install what it names, or use another base") from None  # fmt: skip
    lacking = sorted(str(one) for key in ("missing_keys", "mismatched_keys") for one in info.get(key) or ())
    if lacking:
        raise InputError("the model's class has tensors that the checkpoint lacks, or has in other shapes",
                         where=checkpoint.label, found=", ".join(lacking[:3]) + ", ..." * (len(lacking) > 3),
                         remedy=f"check {CONFIG} and the tensors")  # fmt: skip
    set_generation(model, checkpoint)
    with memory("loading the model"):
        model = model.requires_grad_(False).eval().to(run.device)
    return Loaded(model, frozenset(map(str, info.get("unexpected_keys") or ())))


def _build(checkpoint: Checkpoint, folder: Path, causal: bool) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind = _class_of(config, causal)
    state = state_of(checkpoint, "float32")
    with memory("loading the model"):
        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    return model, info


def _class_of(config: Any, causal: bool) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for name in config.architectures or ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    kinds = (MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_MAPPING)[type(config)]
    return kinds[0] if isinstance(kinds, Sequence) else kinds
