"""Kill, interrupt, race and starve `regraft apply`, and look at what it leaves behind.

Usage: python tests/faults/campaign.py [short] [--seed N]

Run from outside pytest because it takes minutes: `nox -s faults`, in CI `nox -s faults -- short`. Ends with the counts
and exit code 0, or with the first violation and exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

REGRAFT = [sys.executable, "-m", "regraft"]
TIMEOUT_SECONDS = 120


def make_base(folder: Path, megabytes: int) -> None:
    """A llama checkpoint of about that size in two shards."""
    hidden, layers = 512, max(2, megabytes * 1_000_000 // (2 * 14 * 512 * 512))
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
    shapes = {"model.embed_tokens.weight": (512, hidden), "model.norm.weight": (hidden,)}
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
    halves = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    folder.mkdir()
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def make_training(root: Path) -> Path:
    """A fine-tune of the embedded model that saves its state every fifth of sixty steps, and a step after it."""
    lines = [json.dumps({"text": f"In the beginning was the word, and the word was {n}."}) for n in range(64)]
    (root / "texts.jsonl").write_text("\n".join(lines))
    recipe = root / "training.toml"
    recipe.write_text(
        '[base]\nmodel = "demo:tiny"\n[[steps]]\nuse = "fine-tune"\ndata = "texts.jsonl"\ntask = "text"\n'
        'steps = 60\nepochs = 60\nbatch_size = 8\nlr = 1e-4\ntrain = { precision = "float32", save_every = 5 }\n'
        '[[steps]]\nuse = "context-extension"\nmethod = "abf"\ntarget_length = 4096\n'
    )
    return recipe


def make_recipe(root: Path) -> Path:
    """Context extension and a cast: every tensor is computed."""
    recipe = root / "recipe.toml"
    recipe.write_text(
        '[base]\nmodel = "base"\n[[steps]]\nuse = "context-extension"\nmethod = "abf"\ntarget_length = 8192\n'
        '[output]\ndtype = "float16"\n'
    )
    return recipe


class Campaign:
    """One base, one recipe, many accidents."""

    def __init__(self, root: Path, rng: random.Random, megabytes: int) -> None:
        self.root, self.rng = root, rng
        self.target = root / "out"
        self.work = root / ".out.regraft"
        make_base(root / "base", megabytes)
        self.recipe, self.training = make_recipe(root), make_training(root)
        self.stable = {path.name for path in root.iterdir()}

    def start(self, *options: str, recipe: Path | None = None) -> subprocess.Popen[str]:
        """An `apply` on its way."""
        command = [*REGRAFT, "apply", str(recipe or self.recipe), "-o", str(self.target), "--no-durable", *options]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def finish(self, *options: str, recipe: Path | None = None) -> None:
        """A whole `apply`, which must succeed."""
        process = self.start(*options, recipe=recipe)
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        self.expect(process.returncode == 0, f"a clean run failed: {errors}")
        self.check("after a clean run", must_exist=True)

    def expect(self, condition: bool, message: str) -> None:
        """Stop the campaign unless `condition` holds."""
        if not condition:
            raise SystemExit(f"VIOLATION: {message}")

    def check(self, when: str, *, must_exist: bool | None = None) -> bool:
        """The target is absent or complete, and nothing else stands in the folder but the work folder."""
        stray = {path.name for path in self.root.iterdir()} - self.stable - {"out", ".out.regraft"}
        self.expect(not stray, f"{when}: stray files {sorted(stray)}")
        if must_exist is not None:
            self.expect(
                self.target.exists() == must_exist, f"{when}: the target {'is missing' if must_exist else 'exists'}"
            )
        if self.target.exists():
            done = subprocess.run(
                [*REGRAFT, "verify", str(self.target), "--json"],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
            self.expect(done.returncode == 0, f"{when}: the target is not complete: {done.stdout}{done.stderr}")
        return self.target.exists()

    def kills(self, count: int, seconds: float) -> dict[str, int]:
        """SIGKILL at random moments of runs into a new target, and of runs that replace one."""
        outcome = {"absent": 0, "complete": 0}
        for number in range(count):
            replacing = number % 3 == 2
            shutil.rmtree(self.target, ignore_errors=True)
            if replacing:
                self.finish()
            process = self.start("--force")
            time.sleep(self.rng.uniform(0.1, 1.0) * seconds)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=TIMEOUT_SECONDS)
            there = self.check(f"kill {number}", must_exist=True if replacing else None)
            outcome["complete" if there else "absent"] += 1
        shutil.rmtree(self.target, ignore_errors=True)
        self.finish()
        self.expect(not self.work.exists(), "a clean run leaves its work folder")
        return outcome

    def interrupts(self, count: int, seconds: float) -> None:
        """Ctrl-C and SIGTERM: exit code 130 (or 0 if the run was faster), and no work folder."""
        for number in range(count):
            shutil.rmtree(self.target, ignore_errors=True)
            process = self.start()
            time.sleep(self.rng.uniform(0.5, 1.0) * seconds)
            process.send_signal(self.rng.choice([signal.SIGINT, signal.SIGTERM]))
            _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
            there = self.check(f"interrupt {number}", must_exist=True if process.returncode == 0 else None)
            # Killed by the signal itself: it came before the handler was installed, or while the interpreter shut down.
            allowed = {130, -signal.SIGINT, -signal.SIGTERM} | ({0} if there else set())
            self.expect(process.returncode in allowed, f"exit code {process.returncode}: {errors}")
            self.expect("Traceback" not in errors, f"a traceback: {errors}")
            self.expect(not self.work.exists(), f"interrupt {number} leaves the work folder")

    def races(self, count: int) -> None:
        """Two runs into one target at once: one wins, the other says so or runs after it; never a mixture."""
        for number in range(count):
            shutil.rmtree(self.target, ignore_errors=True)
            both = [self.start(), self.start()]
            results = [(process.communicate(timeout=TIMEOUT_SECONDS)[1], process.returncode) for process in both]
            codes = sorted(code for _, code in results)
            self.expect(codes[0] == 0 and codes[1] in (2, 4), f"race {number}: exit codes {codes}: {results}")
            self.check(f"race {number}", must_exist=True)

    def trainings(self, count: int) -> str:
        """A run that trains, broken off again and again, ends with the bytes of one that was left alone."""
        shutil.rmtree(self.target, ignore_errors=True)
        started = time.monotonic()
        self.finish(recipe=self.training)
        seconds, expected = time.monotonic() - started, self.bytes_of_target()
        broken, resumed = 0, 0
        for number in range(count):
            shutil.rmtree(self.target)
            for _ in range(3):
                process = self.start(recipe=self.training)
                time.sleep(self.rng.uniform(0.3, 1.0) * seconds)
                process.send_signal(self.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT]))
                process.communicate(timeout=TIMEOUT_SECONDS)
                if self.check(f"training {number}"):
                    break
                broken += 1
                resumed += any((self.work / "state").glob("*/*/step-*"))
            else:
                self.finish(recipe=self.training)
            self.expect(self.bytes_of_target() == expected, f"training {number}: other bytes than when left alone")
            self.expect(not self.work.exists(), f"training {number} leaves its work folder")
        return f"{broken} times broken off, {resumed} times with a state to go on from, the same bytes every time"

    def bytes_of_target(self) -> dict[str, str]:
        """SHA-256 of every file."""
        files = [path for path in self.target.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.target)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def full_disk(self) -> str:
        """A file system that is too small: refused before writing; and one that fills up while writing."""
        small = self.root / "small"
        small.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)], capture_output=True, check=False
        )
        if mounted.returncode != 0:
            small.rmdir()
            return "not run: no right to mount a small file system"
        try:
            command = [*REGRAFT, "apply", str(self.recipe), "-o", str(small / "out")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
            self.expect(
                done.returncode == 4 and "disk" in done.stderr, f"a small disk: {done.returncode} {done.stderr}"
            )
            self.expect(not list(small.iterdir()), f"a small disk: leaves {list(small.iterdir())}")
        finally:
            subprocess.run(["umount", str(small)], check=True)
            small.rmdir()
        return "refused with exit code 4, nothing left"


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser()
    parser.add_argument("size", nargs="?", choices=["short", "full"], default="full")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    short = options.size == "short"
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), random.Random(options.seed), megabytes=60 if short else 240)
        campaign.finish()
        shutil.rmtree(campaign.target)
        started = time.monotonic()
        campaign.start().communicate(timeout=TIMEOUT_SECONDS)
        seconds = time.monotonic() - started
        outcome = campaign.kills(9 if short else 60, seconds)
        print(f"kills: {outcome['absent']} left the target absent, {outcome['complete']} complete, 0 anything else")
        count = 4 if short else 20
        campaign.interrupts(count, seconds)
        print(f"interrupts: {count} of {count} clean")
        campaign.races(2 if short else 8)
        print("races: one winner each time")
        print(f"trainings: {campaign.trainings(2 if short else 10)}")
        print(f"full disk: {campaign.full_disk()}")


if __name__ == "__main__":
    main()
