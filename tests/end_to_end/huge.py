"""A model of 40 GB that takes no disk, and what the writer takes of memory; offsets beyond 4 GB.

The weight files of the base are holes: zeros that stand nowhere. An adapter is merged into the embeddings, a tensor of
4.3 GB, and into a projection behind them in the same file; the other 78 files are linked. So 4.7 GB of disk are
written, and every value is known: the base is zero, and the output is the adapter's product, rounded once.

Usage: python tests/end_to_end/huge.py [short]   (both are the same)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from regraft.core.header import render_header
from regraft.core.sources.shape import open_shape

LAYERS, HIDDEN, VOCABULARY = 78, 4096, 524_800
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": False,
    "hidden_size": HIDDEN, "intermediate_size": 11_008, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
EMBEDDINGS, QUERY = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
PREFIX, RANK, SCALE = "base_model.model.model", 2, 2.0
ADAPTER = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK, "target_modules": ["embed_tokens", "q_proj"]}
DISK_BYTES, MOST_BYTES = 6 << 30, 450 << 20

APPLY = """
import sys
from pathlib import Path
from regraft.cli.main import run
try:
    run(sys.argv[1:])
except SystemExit as end:
    if end.code:
        raise
peak, = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak) * 1024)
"""


def sparse_model(folder: Path) -> int:
    """79 files: embeddings and layer 0 in the first, one for each other layer, the head in the last; their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    groups: dict[int, list] = {}
    for name, spec in open_shape(folder).specs.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0 if name == EMBEDDINGS else LAYERS
        groups.setdefault(layer, []).append(spec)
    weight_map = {}
    for number, specs in sorted(groups.items()):
        file = folder / f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        specs.sort(key=lambda spec: spec.name != EMBEDDINGS)
        header = render_header(specs, {"format": "pt"})
        file.write_bytes(header)
        os.truncate(file, len(header) + sum(spec.nbytes for spec in specs))
        weight_map |= {spec.name: file.name for spec in specs}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Factors of the embeddings and of layer 0's queries, random."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    shapes = {
        "embed_tokens.lora_embedding_A": (RANK, VOCABULARY),
        "embed_tokens.lora_embedding_B": (HIDDEN, RANK),
        "layers.0.self_attn.q_proj.lora_A.weight": (RANK, HIDDEN),
        "layers.0.self_attn.q_proj.lora_B.weight": (HIDDEN, RANK),
    }
    random = torch.Generator().manual_seed(0)
    factors = {f"{PREFIX}.{name}": torch.randn(shape, generator=random) for name, shape in shapes.items()}
    save_file(factors, folder / "adapter_model.safetensors")
    return load_file(folder / "adapter_model.safetensors")


def regraft(*arguments: str, program: tuple[str, ...] = ("-m", "regraft")) -> str:
    """What a command prints."""
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_values(folder: Path, factors: dict[str, torch.Tensor]) -> None:
    """Rows at both ends of both changed tensors, against one product."""
    a, b = (factors[f"{PREFIX}.embed_tokens.lora_embedding_{letter}"] for letter in "AB")
    left, right = (factors[f"{PREFIX}.layers.0.self_attn.q_proj.lora_{letter}.weight"] for letter in "BA")
    with safe_open(sorted(folder.glob("*.safetensors"))[0], "pt") as file:
        for name, one, other in ((EMBEDDINGS, a.T, b.T), (QUERY, left, right)):
            stored = file.get_slice(name)
            rows = stored.get_shape()[0]
            for part in (slice(0, 3), slice(rows - 3, rows)):
                expected = SCALE * (one[part].double() @ other.double())
                error = (stored[part].double() - expected).abs() / expected.abs().clamp(min=1e-3)
                assert error.max() < 2**-8, f"{name}, rows {part}: {error.max()}"


def main() -> None:
    """Run it and print the figures."""
    with tempfile.TemporaryDirectory(prefix="regraft-huge-") as name:
        place = Path(name)
        assert shutil.disk_usage(place).free > DISK_BYTES, f"needs {DISK_BYTES} bytes of disk"
        size, factors = sparse_model(place / "base"), write_adapter(place / "adapter")
        recipe = place / "recipe.toml"
        recipe.write_text('[base]\nmodel = "base"\n[[steps]]\nuse = "lora-merge"\nadapter = "adapter"\n')
        plan = json.loads(regraft("plan", str(recipe), "--link", "--threads", "2", "--json"))
        options = ["-o", str(place / "out"), "--link", "--threads", "2", "--no-durable"]
        started = time.monotonic()
        peak = int(regraft("apply", str(recipe), *options, program=("-c", APPLY)).splitlines()[-1])
        seconds = time.monotonic() - started
        assert plan["weight_bytes"] > size - (1 << 20) > 40e9
        assert peak <= plan["memory_bytes"] <= MOST_BYTES, (peak, plan["memory_bytes"])
        check_values(place / "out", factors)
        linked = sorted((place / "out").glob("*.safetensors"))[1:]
        assert len(linked) == LAYERS
        assert all(file.samefile(place / "base" / file.name) for file in linked)
    print(f"{size / 1e9:.1f} GB, of which 4.7 GB written in {seconds:.0f} s: peak {peak >> 20} MiB, "
          f"planned at most {plan['memory_bytes'] >> 20} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
