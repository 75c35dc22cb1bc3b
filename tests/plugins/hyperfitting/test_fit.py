"""What the training does and does not change: oracles 13, 14, 18 and the end points of `strength`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.core.patch import overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.training.objectives import CrossEntropy
from regraft.core.transformation import Run
from regraft.plugins.hyperfitting import fit as module
from tests.core.training.support import model_of
from tests.families import FAMILIES, save_tiny
from tests.materialise import materialise
from tests.plugins.hyperfitting.support import bits, report_bytes, step

Folder = Callable[..., Path]


def test_training_loss_falls_to_nearly_zero_and_the_model_becomes_sure(tiny_folder: Folder, text: Path) -> None:
    """Oracle 13, of a random model; that held-out loss rises is the paper's point."""
    _, patch = step(tiny_folder(), text, epochs=80, lr=3e-3, stop_loss=0.15, held_out=4)
    metrics, before, after = patch.metrics, patch.metrics["before"], patch.metrics["after"]
    assert metrics["first_loss"] > 4
    assert metrics["stopped"] == "stop_loss"
    assert metrics["steps"] < metrics["planned_steps"] == 160
    assert metrics["last_epoch_loss"] < 0.15
    assert after["training"]["loss"] < 0.15
    assert after["held_out"]["entropy"] < 0.8 * before["held_out"]["entropy"]
    assert after["held_out"]["top_probability"] > before["held_out"]["top_probability"]
    assert after["training"]["loss"] < 0.1 * after["held_out"]["loss"]


def test_no_rate_no_change(tiny_folder: Folder, text: Path) -> None:
    """Oracle 14: every tensor still stands where it stood, and the figures are the same twice."""
    base = open_checkpoint(str(tiny_folder()))
    result, patch = step(base, text, lr=0.0)
    assert all(result.raw(name) == base.raw(name) is not None for name in base.specs)
    assert patch.metrics["changed_tensors"] == 0
    assert patch.metrics["before"] == patch.metrics["after"]
    assert set(patch.edits) == set(base.specs)


def test_nothing_decays_and_no_dropout(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle 14: GPT-2 ships dropout of 0.1; it is off in every step, and the config stays as it is."""
    base = save_tiny("gpt2", tmp_path / "base", tokenizer=True)
    decays, rates = [], []

    class Optimizer(torch.optim.AdamW):
        def __init__(self, groups: Any, **options: Any) -> None:
            super().__init__(groups, **options)
            decays.extend(group["weight_decay"] for group in self.param_groups)

    class Watching(CrossEntropy):
        def __call__(self, batch: Any) -> Any:
            modules = [one for one in self.head.model.modules() if isinstance(one, torch.nn.Dropout)]
            rates.extend((one.p, one.training) for one in modules)
            return super().__call__(batch)

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    monkeypatch.setattr(module, "CrossEntropy", Watching)
    result, _ = step(base, text)
    assert len(decays) == 2
    assert set(decays) == {0.0}
    assert len(rates) > 10
    assert set(rates) == {(0.0, True)}
    assert result.config == json.loads((base / "config.json").read_text())
    assert result.config["resid_pdrop"] == 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength(tiny_folder: Folder, text: Path, dtype: torch.dtype) -> None:
    """0 is the base and 1 what was trained, byte for byte; between, each weight lies between."""
    base = open_checkpoint(str(tiny_folder(dtype=dtype)))
    tuned, patch = step(base, text)
    nothing, nothing_patch = step(base, text, strength=0.0)
    whole, whole_patch = step(base, text, strength=1.0)
    half, half_patch = step(base, text, strength=0.5)
    assert all(nothing.raw(name) == base.raw(name) for name in base.specs)
    assert bits(whole) == bits(tuned)
    assert report_bytes(whole_patch) == report_bytes(patch)
    moved = 0
    for name in base.specs:
        start, middle, end = (one.load(name).float() for one in (base, half, tuned))
        low, high = torch.minimum(start, end), torch.maximum(start, end)
        assert bool(((low <= middle) & (middle <= high)).all()), name
        moved += int(((low < middle) & (middle < high)).sum())
    assert moved > 1000
    losses = [one.metrics["after"]["training"]["loss"] for one in (nothing_patch, half_patch, patch)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == patch.metrics["before"]["training"]["loss"]


def test_seeds(tiny_folder: Folder, text: Path) -> None:
    """Oracle 18: the same seed gives the same bytes, reports and figures; another draws and shuffles otherwise."""
    runs = [step(tiny_folder(), text, run=Run("hyperfitting", seed=seed)) for seed in (3, 3, 4)]
    assert bits(runs[0][0]) == bits(runs[1][0]) != bits(runs[2][0])
    assert report_bytes(runs[0][1]) == report_bytes(runs[1][1])
    assert runs[0][1].metrics == runs[1][1].metrics
    assert runs[0][1].notes == runs[1][1].notes
    assert runs[0][1].metrics["first_loss"] != runs[2][1].metrics["first_loss"]


def test_a_run_that_was_interrupted_goes_on(
    tiny_folder: Folder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle 18: and ends with the bytes of one that was not."""
    whole, patch = step(tiny_folder(), text, epochs=4)
    steps = 0

    def interrupting(tell: Any) -> Any:
        def listen(progress: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == 5:
                raise KeyboardInterrupt

        return listen

    run = Run("hyperfitting", state=tmp_path / "state")
    with monkeypatch.context() as patched:
        patched.setattr(module, "telling", interrupting)
        with pytest.raises(KeyboardInterrupt):
            step(tiny_folder(), text, epochs=4, save_every=2, run=run)
    assert [path.name for path in (tmp_path / "state" / "tune").iterdir()] == ["step-00000004"]
    again, resumed = step(tiny_folder(), text, epochs=4, save_every=2, run=run)
    assert bits(again) == bits(whole)
    assert report_bytes(resumed) == report_bytes(patch)
    assert resumed.metrics == patch.metrics


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_every_family_is_trained_stored_and_reloaded(family: str, tmp_path: Path, text: Path) -> None:
    """What is written loads in the stock class, and gives the figures that the report says."""
    base = save_tiny(family, tmp_path / "base", tokenizer=True)
    result, patch = step(base, text, epochs=1, lr=1e-2)
    assert patch.metrics["changed_tensors"] > 5
    assert patch.metrics["after"]["training"]["loss"] != patch.metrics["before"]["training"]["loss"]
    model = model_of(materialise(result, tmp_path / "out"))
    for name, parameter in model.named_parameters():
        assert bool(torch.isfinite(parameter).all()), name


def test_a_tied_head_that_is_stored_follows_its_embedding(tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = save_tiny("llama-tied", tmp_path / "base", tokenizer=True)
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    result, _ = step(base, text)
    assert result.raw("model.embed_tokens.weight") is None
    assert torch.equal(result.load("lm_head.weight"), result.load("model.embed_tokens.weight"))
    model_of(materialise(result, tmp_path / "out"))


def test_a_buffer_that_is_stored_stays(tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    base = save_tiny("llama", tmp_path / "base", tokenizer=True)
    file = base / "model.safetensors"
    save_file({**load_file(file), name: torch.arange(8.0)}, file, {"format": "pt"})
    result, _ = step(base, text)
    assert result.raw(name) == open_checkpoint(str(base)).raw(name)


def test_figures_are_those_of_the_stored_weights(tmp_path: Path, text: Path) -> None:
    """At this rate bfloat16 rounds nearly every change away: the report must not show what only fp32 weights know."""
    base = save_tiny("llama", tmp_path / "base", tokenizer=True, dtype=torch.bfloat16)
    _, patch = step(base, text, epochs=1, lr=1e-7)
    before, after = (patch.metrics[name]["training"]["loss"] for name in ("before", "after"))
    assert after == pytest.approx(before, abs=1e-5)
    assert patch.metrics["changed_tensors"] < patch.metrics["trained_tensors"]


def test_pieces_average_and_optimisers(tiny_folder: Folder, text: Path) -> None:
    plain, patch = step(tiny_folder(), text)
    pieces, _ = step(tiny_folder(), text, micro_batch=1)
    for name in plain.specs:
        torch.testing.assert_close(pieces.load(name), plain.load(name), rtol=0, atol=1e-4)
    others = {
        "ema": {"ema": 0.5},
        "spam": {"optimizer": "spam"},
        "8-bit": {"optimizer": "adamw-8bit"},
        "clipped": {"clip_norm": 0.01, "optimizer": "spam"},
    }
    seen = {json.dumps(patch.metrics["after"])}
    for values in others.values():
        _, other = step(tiny_folder(), text, gradient_checkpointing=True, **values)
        assert other.metrics["first_loss"] == pytest.approx(patch.metrics["first_loss"], rel=1e-5)
        seen.add(json.dumps(other.metrics["after"]))
    assert len(seen) == 1 + len(others)


def test_what_stands_below_is_trained(tiny_folder: Folder, text: Path) -> None:
    """A step sees the checkpoint as the steps before it made it."""
    once, _ = step(tiny_folder(), text)
    twice, patch = step(once, text)
    assert bits(twice) != bits(once)
    assert patch.metrics["before"] == step(tiny_folder(), text)[1].metrics["after"]
    assert overlay(once, patch, by="again").specs == once.specs
