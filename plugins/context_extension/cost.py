"""How much memory and disk fine-tune and probe take, from headers alone."""

from __future__ import annotations

from math import prod

from regraft.core.checkpoint import Checkpoint
from regraft.core.measures.reading import SCORES
from regraft.core.training.footprint import model_bytes, shared_bytes, state_bytes, training_bytes
from regraft.core.training.whole import learnable
from regraft.plugins.context_extension.settings import TuneSettings

_FP32 = 4


def tune_bytes(checkpoint: Checkpoint, settings: TuneSettings, target: int) -> int:
    """Host memory of the training at its peak."""
    tokens = min(settings.micro_batch, settings.batch_size) * (settings.data.max_tokens or target)
    return training_bytes(checkpoint, tokens=tokens, ema=settings.ema is not None)


def tune_shared_bytes(checkpoint: Checkpoint, settings: TuneSettings) -> int:
    """Of `tune_bytes`, what the processes of a run share out."""
    return shared_bytes(_learning(checkpoint), ema=settings.ema is not None)


def tune_state_bytes(checkpoint: Checkpoint, settings: TuneSettings) -> int:
    """Disk of the saved states."""
    return state_bytes(_learning(checkpoint), ema=settings.ema is not None)


def _learning(checkpoint: Checkpoint) -> int:
    return sum(prod(spec.shape) for spec in learnable(checkpoint).values())


def probe_bytes(checkpoint: Checkpoint, target: int) -> int:
    """Host memory of a measurement at its peak: the model, attention scores, and two key-value caches."""
    text = checkpoint.text_config
    heads, layers, hidden = (text.get(key) or 0 for key in ("num_attention_heads", "num_hidden_layers", "hidden_size"))
    width = text.get("head_dim") or hidden // max(1, heads)
    kept = 2 * layers * (text.get("num_key_value_heads") or heads) * width * target
    return model_bytes(checkpoint) + _FP32 * (3 * min(SCORES, heads * target * target) + 2 * kept + 8 * hidden * target)
