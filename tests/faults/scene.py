"""Where accidents happen: a folder with a base and recipes, runs of `regraft` in it, and what must hold afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

REGRAFT = (sys.executable, "-m", "regraft")
TIMEOUT_SECONDS = 180


class Violation(Exception):
    """Something that must never happen has happened."""


def expect(condition: bool, message: str) -> None:
    """Stop the campaign unless `condition` holds.

    Raises:
        Violation: it does not.
    """
    if not condition:
        raise Violation(message)


class Scene:
    """One base, its recipes, one target.

    Args:
        root: an empty folder.
        rng: decides the moments.
        megabytes: size of the base.
        due: whether there is time for another accident.
    """

    def __init__(self, root: Path, rng: random.Random, megabytes: float, due: Callable[[], bool]) -> None:
        self.root, self.rng, self.due = root, rng, due
        self.target, self.work = root / "out", root / ".out.regraft"
        self.base = make_base(root / "base", megabytes)
        self.recipe, self.training = make_recipe(root), make_training(root)
        self.stable = {path.name for path in root.iterdir()}
        self.base_bytes = digests(self.base)

    def start(self, *options: str, recipe: Path | None = None, target: Path | None = None) -> subprocess.Popen[str]:
        """An `apply` on its way."""
        command = [*REGRAFT, "apply", str(recipe or self.recipe), "-o", str(target or self.target), "--no-durable"]
        return subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def finish(self, *options: str, recipe: Path | None = None) -> float:
        """A whole `apply`, which must succeed; gives its seconds."""
        started = time.monotonic()
        process = self.start(*options, recipe=recipe)
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        seconds = time.monotonic() - started
        expect(process.returncode == 0, f"a clean run failed: {errors}")
        self.check("after a clean run", must_exist=True)
        expect(not self.work.exists(), "a clean run leaves its work folder")
        return seconds

    def check(self, when: str, *, must_exist: bool | None = None, work: bool = True) -> bool:
        """The target is absent or complete, the base is untouched, and nothing else stands in the folder.

        Args:
            when: for messages.
            must_exist: whether the target must or must not be there.
            work: whether the work folder may be there.
        """
        stray = {path.name for path in self.root.iterdir()} - self.stable - {"out"}
        expect(stray <= ({self.work.name} if work else set()), f"{when}: stray files {sorted(stray)}")
        there = self.target.exists()
        if must_exist is not None:
            expect(there == must_exist, f"{when}: the target {'is missing' if must_exist else 'exists'}")
        if there:
            verify(self.target, when)
        return there

    def rounds(self, count: int, stride: int = 1) -> Iterator[int]:
        """Every so many number below `count`: the first one in any case, the others as long as there is time."""
        yield from (number for number in range(0, count, stride) if not number or self.due())

    def clear(self) -> None:
        """Remove the target and the work folder."""
        shutil.rmtree(self.target, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)


def verify(folder: Path, when: str) -> None:
    """`regraft verify` must find nothing.

    Raises:
        Violation: it does.
    """
    command = [*REGRAFT, "verify", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    expect(done.returncode == 0, f"{when}: the target is not complete: {done.stdout}{done.stderr}")


def said_plainly(errors: str, when: str) -> None:
    """One error in our words, no traceback.

    Raises:
        Violation: it is not.
    """
    expect("Traceback" not in errors, f"{when}: a traceback: {errors}")
    lines = [line for line in errors.splitlines() if line.startswith(("error:", "interrupted"))]
    expect(len(lines) == 1, f"{when}: {len(lines)} errors: {errors}")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_base(folder: Path, megabytes: float, shards: int = 2) -> Path:
    """A llama checkpoint of about that size."""
    hidden = 512 if megabytes >= 8 else 64
    layers = max(2, int(megabytes * 1_000_000 / (2 * 14 * hidden * hidden)))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (512, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": (hidden,), f"{at}.post_attention_layernorm.weight": (hidden,)}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (hidden // 2, hidden) for name in "kv"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (4 * hidden, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, 4 * hidden)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}
    names = list(tensors)
    step = -(-len(names) // shards)
    parts = {
        f"model-{number + 1:05d}-of-{shards:05d}.safetensors": names[number * step : (number + 1) * step]
        for number in range(shards)
    }
    folder.mkdir()
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_recipe(root: Path) -> Path:
    """Context extension and a cast: every tensor is computed."""
    return _written(root / "recipe.toml", 'model = "base"', [_ABF], '[output]\ndtype = "float16"\n')


def make_training(root: Path) -> Path:
    """A fine-tune of the embedded model that saves its state every fifth of sixty steps, and a step after it."""
    lines = [json.dumps({"text": f"In the beginning was the word, and the word was {n}."}) for n in range(64)]
    (root / "texts.jsonl").write_text("\n".join(lines))
    tuning = (
        'use = "fine-tune"\ndata = "texts.jsonl"\ntask = "text"\nsteps = 60\nepochs = 60\nbatch_size = 8\nlr = 1e-4\n'
        'train = { precision = "float32", save_every = 5 }\n'
    )
    return _written(root / "training.toml", 'model = "demo:tiny"', [tuning, _ABF])


_ABF = 'use = "context-extension"\nmethod = "abf"\ntarget_length = 8192\n'


def _written(file: Path, base: str, steps: Iterable[str], output: str = "") -> Path:
    file.write_text(f"[base]\n{base}\n" + "".join(f"[[steps]]\n{step}" for step in steps) + output)
    return file


def without_roots_rights() -> None:
    """Root may write everywhere; without these capabilities rights of files count for root too."""
    import ctypes

    drop, override, search = 24, 1, 2
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for capability in (override, search):
        prctl(drop, capability, 0, 0, 0)
    os.environ.setdefault("HOME", "/nonexistent")
