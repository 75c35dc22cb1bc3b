"""regraft beside cp, safetensors, transformers, peft and mergekit on one synthetic checkpoint of 3.5 GB.

Usage: python benchmarks/side_by_side.py [--rounds 2] [--small] [--keep DIR] [--write docs/benchmarks.md]

Every command is a process of its own; wall time, CPU time, peak RSS and minor faults come from the kernel's accounting
(wait4; a child's peak RSS is never below the harness's own, which is why another process makes the base).
Commands take turns for some rounds, and the table shows medians and ratios to `cp`. Before each, memory is
touched and given back, because fresh pages are slow on some virtual machines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from document import machine, write_section

if TYPE_CHECKING:
    import torch

HIDDEN, INTERMEDIATE, LAYERS, VOCAB, HEADS, RANK = 2048, 8192, 24, 32000, 16, 16
PREFAULT_BYTES = 6 << 30


@dataclass(frozen=True)
class Sample:
    """One run: seconds of wall and CPU, peak RSS in bytes, minor page faults."""

    wall: float
    cpu: float
    rss: int
    faults: int


@dataclass(frozen=True, eq=False)
class Job:
    """A command that writes to a target folder, which is removed before and after."""

    name: str
    work: str
    command: list[str]
    subtract_torch: bool = False


def config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
    }


def make_base(folder: Path, layers: int) -> None:
    """A sharded bf16 llama with random weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).bfloat16()

    groups: list[dict[str, torch.Tensor]] = [{"model.embed_tokens.weight": random(VOCAB, HIDDEN)}]
    for layer in range(layers):
        if layer % max(1, layers // 4) == 0 and layer:
            groups.append({})
        at = f"model.layers.{layer}"
        groups[-1] |= {f"{at}.self_attn.{name}_proj.weight": random(HIDDEN, HIDDEN) for name in "qkvo"}
        groups[-1] |= {f"{at}.mlp.{name}_proj.weight": random(INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        groups[-1][f"{at}.mlp.down_proj.weight"] = random(HIDDEN, INTERMEDIATE)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            groups[-1][f"{at}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    groups[-1] |= {
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "lm_head.weight": random(VOCAB, HIDDEN),
    }
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for name, tensors in zip(names, groups, strict=True):
        save_file(tensors, folder / name, {"format": "pt"})
    weight_map = {tensor: name for name, tensors in zip(names, groups, strict=True) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config(layers)))
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """mergekit wants a tokenizer; its contents do not matter."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{index}": index for index in range(VOCAB)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"})
    )


def make_adapter(folder: Path, base: Path, layers: int, letters: str = "q") -> None:
    """A LoRA of rank 16, fp32, for every projection of attention that `letters` (some of qkvo) names."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer, letter in itertools.product(range(layers), letters):
        at = f"base_model.model.model.layers.{layer}.self_attn.{letter}_proj"
        tensors[f"{at}.lora_A.weight"] = 0.02 * torch.randn(RANK, HIDDEN, generator=generator)
        tensors[f"{at}.lora_B.weight"] = 0.02 * torch.randn(HIDDEN, RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 32,
        "target_modules": [f"{letter}_proj" for letter in letters],
    }
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))


def write_recipes(root: Path) -> dict[str, Path]:
    """The recipes of the table, by name."""
    extension = '[[steps]]\nuse = "context-extension"\nmethod = "abf"\ntarget_length = 16384\n'
    lora = '[[steps]]\nid = "lora{0}"\nuse = "lora-merge"\nadapter = "adapter"\n'
    texts = {
        "config": extension,
        "one": '[[steps]]\nuse = "lora-merge"\nadapter = "one"\n',
        "lora": lora.format(1),
        "lora2": lora.format(1) + lora.format(2),
        "attention": '[[steps]]\nuse = "lora-merge"\nadapter = "attention"\n',
        "lora3": lora.format(1) + lora.format(2) + lora.format(3),
        "cast": '[output]\ndtype = "float16"\n',
    }
    paths = {}
    for name, text in texts.items():
        paths[name] = root / f"{name}.toml"
        paths[name].write_text(f'[base]\nmodel = "base"\n{text}')
    return paths


def jobs(root: Path, recipes: dict[str, Path], *, peers: bool) -> list[Job]:
    """Every command of the table."""
    base, out = root / "base", str(root / "out")

    def ours(recipe: str, *options: str) -> list[str]:
        return [sys.executable, "-m", "regraft", "apply", str(recipes[recipe]), "-o", out, *options]

    def python(code: str) -> list[str]:
        return [sys.executable, "-c", textwrap.dedent(code).format(base=base, out=out, root=root)]

    fast = "--no-durable"
    table = [
        Job("cp", "copy", ["cp", "-r", str(base), out]),
        Job("cp, then sync", "copy", ["sh", "-c", f"cp -r {base} {out} && sync {out}/*"]),
        Job("import torch", "T0", [sys.executable, "-c", "import torch"]),
        Job("regraft --link", "config only", ours("config", "--link", fast)),
        Job("regraft", "config only", ours("config", fast)),
        Job("regraft --link", "one tensor", ours("one", "--link", fast), True),
        Job("regraft", "one tensor", ours("one", fast), True),
        Job("regraft", "LoRA into every q_proj", ours("lora", fast), True),
        Job("regraft, durable", "LoRA into every q_proj", ours("lora"), True),
        Job("regraft, 2 steps", "LoRA into every q_proj", ours("lora2", fast), True),
        Job("regraft, 3 steps", "LoRA into every q_proj", ours("lora3", fast), True),
        Job("regraft", "LoRA into every q, k, v, o", ours("attention", fast), True),
        Job("regraft, durable", "LoRA into every q, k, v, o", ours("attention"), True),
        Job("regraft", "all bf16 to fp16", ours("cast", fast), True),
        Job("regraft, durable", "all bf16 to fp16", ours("cast"), True),
    ]
    return table + peer_jobs(root, python) if peers else table


def peer_jobs(root: Path, python) -> list[Job]:  # noqa: ANN001 - a local closure of jobs()
    """The same work by others."""
    for name, lora in (("passthrough", ""), ("with_lora", f"+{root / 'adapter'}")):
        (root / f"{name}.yml").write_text(
            f"merge_method: passthrough\nmodels:\n  - model: {root / 'base'}{lora}\ndtype: bfloat16\n"
        )

    def mergekit(name: str) -> list[str]:
        program = str(Path(sys.executable).with_name("mergekit-yaml"))
        return [program, str(root / f"{name}.yml"), str(root / "out"), "--lora-merge-cache", str(root / "merged")]

    safetensors = """
        from pathlib import Path
        from safetensors.torch import load_file, save_file
        import torch
        Path("{out}").mkdir()
        for path in Path("{base}").glob("*.safetensors"):
            save_file({{k: CAST for k, v in load_file(path).items()}}, "{out}/" + path.name)
    """
    transformers = """
        import torch
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained("{base}", dtype=torch.DTYPE).save_pretrained("{out}")
    """
    merged = """
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("{base}", dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, "{root}/ADAPTER").merge_and_unload().save_pretrained("{out}")
    """
    return [
        Job("safetensors load + save", "config only", python(safetensors.replace("CAST", "v"))),
        Job("transformers load + save", "config only", python(transformers.replace("DTYPE", "bfloat16"))),
        Job("mergekit passthrough", "config only", mergekit("passthrough")),
        Job("peft merge + save", "LoRA into every q_proj", python(merged.replace("ADAPTER", "adapter"))),
        Job("peft merge + save", "LoRA into every q, k, v, o", python(merged.replace("ADAPTER", "attention"))),
        Job("mergekit passthrough + LoRA", "LoRA into every q_proj", mergekit("with_lora")),
        Job("transformers load + save", "all bf16 to fp16", python(transformers.replace("DTYPE", "float16"))),
        Job("safetensors load + half + save", "all bf16 to fp16", python(safetensors.replace("CAST", "v.half()"))),
    ]


def startup_jobs(root: Path) -> list[Job]:
    """What a user waits for before anything happens."""
    (root / "wrong.toml").write_text('[base]\nmodell = "base"\n[[steps]]\nuse = "context-extention"\n')
    regraft = [sys.executable, "-m", "regraft"]
    return [
        Job("regraft --help", "startup", [*regraft, "--help"]),
        Job("regraft apply on an invalid recipe", "startup", [*regraft, "apply", str(root / "wrong.toml")]),
        Job("regraft plan", "startup", [*regraft, "plan", str(root / "config.toml")]),
    ]


def prefault(nbytes: int) -> None:
    """Touch and free memory in a child, so that the next command finds pages that the hypervisor has backed."""
    code = f"import mmap; m = mmap.mmap(-1, {nbytes}); [m.__setitem__(i, 1) for i in range(0, {nbytes}, 4096)]"
    subprocess.run([sys.executable, "-c", code], check=True)


def measure(job: Job, out: Path, prefault_bytes: int) -> Sample:
    """Run once. A peer that fails ends the benchmark: no figure is better than a wrong one."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name("merged"), ignore_errors=True)  # mergekit would take it up instead of merging again
    prefault(prefault_bytes)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling at every start would be measured instead
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(job.command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != (2 if "invalid" in job.name else 0):
            log.seek(0)
            raise SystemExit(f"{job.name} ({job.work}) ended with {process.returncode}:\n{log.read().decode()[-3000:]}")
    shutil.rmtree(out, ignore_errors=True)
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, usage.ru_minflt)


def report(table: list[Job], samples: dict[Job, list[Sample]], gigabytes: float, rounds: int) -> list[str]:
    """The section of docs/benchmarks.md."""

    def median(job: Job, field: str) -> float:
        return statistics.median(getattr(sample, field) for sample in samples[job])

    copy, torch_only = table[0], table[2]
    cp, zero = median(copy, "wall"), median(torch_only, "wall")
    lines = [
        f"A synthetic llama checkpoint, bf16, {gigabytes:.2f} GB in four shards, page cache warm. {rounds} rounds",
        "in turn in one run, medians. T0 is a bare `import torch`.",
        "",
        machine("torch", "transformers", "peft", "mergekit", "safetensors"),
        "",
        "| work | tool | wall s | CPU s | peak RSS MB | minor faults | x cp | (T - T0) x cp |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for job in sorted(table, key=lambda job: [other.work for other in table].index(job.work)):
        wall = median(job, "wall")
        net = f"{(wall - zero) / cp:.2f}" if job.subtract_torch else ""
        lines.append(
            f"| {job.work} | {job.name} | {wall:.2f} | {median(job, 'cpu'):.2f} | {median(job, 'rss') / 1e6:.0f} "
            f"| {median(job, 'faults'):.0f} | {wall / cp:.2f} | {net} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a tenth of the size, without peers: a smoke test")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    parser.add_argument("--write", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        root = (options.keep or Path(scratch)).resolve()
        root.mkdir(exist_ok=True)
        layers = 4 if options.small else LAYERS
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            if not (root / "base").exists():
                apart.submit(make_base, root / "base", layers).result()
            for name, count, letters in (("adapter", layers, "q"), ("one", 1, "q"), ("attention", layers, "qkvo")):
                if not (root / name).exists():
                    apart.submit(make_adapter, root / name, root / "base", count, letters).result()
        gigabytes = sum(path.stat().st_size for path in (root / "base").iterdir()) / 1e9
        table = jobs(root, write_recipes(root), peers=not options.small) + startup_jobs(root)
        samples: dict[Job, list[Sample]] = {job: [] for job in table}
        for round_number in range(options.rounds):
            for job in table:
                samples[job].append(measure(job, root / "out", PREFAULT_BYTES // (10 if options.small else 1)))
                print(f"round {round_number + 1}: {job.work}: {job.name}: {samples[job][-1].wall:.2f} s", flush=True)
        lines = report(table, samples, gigabytes, options.rounds)
        write_section(options.write, "Checkpoints", lines)
        print("\n".join(lines))


if __name__ == "__main__":
    main()
