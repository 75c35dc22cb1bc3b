"""Compile every shipped Triton kernel ahead of time and print what it uses.

    python benchmarks/kernel_resources.py [--json]

Exit status 1 if a kernel spills registers or uses more stack than `allowed_stack`. Run it without TRITON_INTERPRET: a
kernel decorated for the interpreter cannot be compiled. It needs Triton 3.3, and no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

MODULES = (
    "regraft.kernels.lora_merge_triton",
    "regraft.kernels.linear_cross_entropy_triton",
    "regraft.kernels.fourier_nll_triton",
    "regraft.kernels.fourier_logits_triton",
    "regraft.kernels.calibrated_attention_triton",
    "regraft.kernels.rope_scale_triton",
    "regraft.kernels.nf4_merge_triton",
)
"""Modules whose `builds()` names what they ship."""

CAPABILITIES = (80, 90)
_WARP_SIZE = 32
_VECTOR_LOAD = r"ld\.global\S*\.v[248]\.|cp\.async\.cg\.shared\.global [^;]*0x10"
"""Into registers, or 16 bytes at a time into shared memory, as pipelined loops load."""


def allowed_stack() -> int:
    """Bytes a thread: none, but for what the assembler of Triton before 3.8 (torch 2.13 has 3.7) puts there."""
    import triton
    from packaging.version import Version

    found = Version(triton.__version__)
    return 0 if found >= Version("3.8") else 16 if found >= Version("3.7") else 112


def compile_build(build: dict[str, Any], capability: int) -> Any:
    """The compiled kernel for `sm_<capability>`, with `asm` (`ptx`, `cubin`) and `metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        build["function"], signature=build["signature"], constexprs=build["constants"], attrs=build["attributes"]
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, _WARP_SIZE), options=build["options"])


def resources(compiled: Any) -> dict[str, int]:
    """Registers, stack and local bytes of a thread, shared bytes of a block, as `cuobjdump` reads them."""
    from triton.backends.nvidia import compiler

    tool = Path(compiler.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "shared": int(compiled.metadata.shared),
        "vector_loads": len(re.findall(_VECTOR_LOAD, compiled.asm["ptx"])),
    }


def measure() -> dict[str, dict[str, int]]:
    """Resources of every shipped kernel on every capability, by name."""
    found = {}
    for module in MODULES:
        for name, build in importlib.import_module(module).builds().items():
            for capability in CAPABILITIES:
                found[f"{name} sm_{capability}"] = resources(compile_build(build, capability))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    found = measure()
    if as_json:
        print(json.dumps(found))
    else:
        width = max(map(len, found))
        for name, usage in found.items():
            print(f"{name:<{width}}  " + "  ".join(f"{key} {value:>5}" for key, value in usage.items()))
    allowed = allowed_stack()
    spilling = [name for name, usage in found.items() if usage["stack"] > allowed or usage["local"]]
    for name in spilling:
        print(f"{name} spills", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
