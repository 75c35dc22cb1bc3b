"""Checks that need processes of their own: imports, determinism, memory, and what is written where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from regraft.core.errors import VerificationError
from regraft.core.header import render_header
from regraft.core.jsonio import dump
from regraft.core.sources.folder import LOCK
from regraft.core.specs import TensorSpec
from regraft.core.testing.checkpoints import tree
from regraft.core.testing.conformance.check import NotApplicable, demand, named
from regraft.core.testing.conformance.subject import Case, Subject
from regraft.core.testing.models import CONFIGS

_SETTINGS = (("1", "1"), ("2", "2"))
"""PYTHONHASHSEED and the number of threads of the two processes."""

_TIMEOUT_SECONDS = 900
_LARGE_LAYERS, _LARGE_ROWS = 24, 8192
"""24 layers with three tensors of 2 MiB each: 150 MB, of which streaming holds a few."""


@dataclass(frozen=True)
class Probe:
    """What one process told of one transformation.

    Args:
        facts: as `probe.py` prints them.
        outputs: where it wrote, by family.
    """

    facts: Mapping[str, Any]
    outputs: Path

    def part(self, name: str) -> Mapping[str, Any]:
        """One part of the facts.

        Raises:
            VerificationError: the process could not do it.
        """
        found: Mapping[str, Any] = self.facts.get(name, {})
        if "error" in found:
            raise VerificationError(
                "fails in a new process", where=name, found=found["error"],
                remedy="see that the class can be imported by its module and name, and needs nothing else",
            )  # fmt: skip
        return found


def probed(subject: Subject) -> tuple[Probe, Probe]:
    """What two processes tell of `subject`; asked once."""
    if subject.probes is None:
        probe([subject])
    assert subject.probes is not None
    return subject.probes


def probe(subjects: Sequence[Subject]) -> None:
    """Ask two processes, with different hash seeds and numbers of threads, about all `subjects` at once.

    Raises:
        VerificationError: a process does not answer.
    """
    started = [_start(subjects, index) for index in range(len(_SETTINGS))]
    answers = [_answer(*process) for process in started]
    for number, subject in enumerate(subjects):
        one, two = (Probe(answer[number], _outputs(subject, index)) for index, answer in enumerate(answers))
        subject.probes = one, two


def _start(subjects: Sequence[Subject], index: int) -> tuple[subprocess.Popen[str], Path]:
    hash_seed, threads = _SETTINGS[index]
    jobs = [_job(subject, index) for subject in subjects]
    file = Path(tempfile.mkstemp(prefix="jobs-", suffix=".json", dir=subjects[0].folder)[1])
    file.write_text(json.dumps(jobs, default=str))
    variables = {
        "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "regraft.core.testing.conformance.probe", str(file)],
        env={**subjects[0].environment, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, file


def _answer(process: subprocess.Popen[str], file: Path) -> list[dict[str, Any]]:
    try:
        out, err = process.communicate(timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        out, err = "", f"no answer within {_TIMEOUT_SECONDS} s"
    file.unlink()
    try:
        answers: list[dict[str, Any]] = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise VerificationError(
            "a new process cannot use the transformation", found=err.strip()[-300:] or f"status {process.returncode}",
            remedy="see that its module can be imported outside of this process",
        ) from None  # fmt: skip
    return answers


def _job(subject: Subject, index: int) -> dict[str, Any]:
    case = subject.case()
    outputs = _outputs(subject, index)
    outputs.mkdir(parents=True)
    return {
        "module": subject.kind.__module__,
        "name": subject.kind.__qualname__,
        **_plain(case),
        "bases": {family: _plain(subject.case(family)) for family in subject.families},
        "outputs": str(outputs),
        "scratch": str(subject.place("scratch")),
        "light": index == 0,
        "torch_threads": _torch_threads(subject, index),
        "large": _large(subject) if index == 0 else None,
    }


def _torch_threads(subject: Subject, index: int) -> int:
    """Those of this process for a step that works by itself: a training's threads are part of its device."""
    import torch

    return torch.get_num_threads() if _works_by_itself(subject) else int(_SETTINGS[index][1])


def _works_by_itself(subject: Subject) -> bool:
    return bool(subject.applied().report.plan.steps[0].outline.workspace_bytes)


def _plain(case: Case) -> dict[str, Any]:
    return {"base": str(case.base), "params": dict(case.params)}


def _outputs(subject: Subject, index: int) -> Path:
    return subject.folder / f"process-{index}"


def _large(subject: Subject) -> dict[str, Any] | None:
    """The case of a large base, for a step that neither works by itself nor says that its parameters do not fit."""
    if _works_by_itself(subject):
        return None
    case = subject.case_of(_large_base())
    return _plain(case) if subject.refusal(case) is None else None


def imports_are_light(subject: Subject) -> None:
    """Importing the module, validating parameters, checking and planning load neither torch nor transformers."""
    found = probed(subject)[0].part("light")
    for stage in ("import", "plan"):
        where = "check and plan" if stage == "plan" else stage
        demand(not found[stage], f"{named(found[stage])} is loaded", where=where,
               remedy="import it inside the functions that compute; for annotations under TYPE_CHECKING")  # fmt: skip


def weights_are_deterministic(subject: Subject) -> None:
    """Processes with other hash seeds and numbers of threads write the same weights."""
    _compare(subject, weights=True)


def records_are_deterministic(subject: Subject) -> None:
    """Processes with other hash seeds and numbers of threads write the same reports, records and other files."""
    _compare(subject, weights=False)


def _compare(subject: Subject, *, weights: bool) -> None:
    probes = probed(subject)
    for one in probes:
        one.part("applied")
    for family in subject.families:
        folders = [subject.applied(family).folder, *(one.outputs / family for one in probes)]
        files = [_chosen(folder, weights=weights) for folder in folders]
        differing = {name for found in files for name in found if len({other.get(name) for other in files}) > 1}
        demand(
            not differing, "other bytes in another process", where=family, found=named(differing),
            remedy="iterate over sorted names, not over sets; no times, no addresses; sum in a fixed order",
        )  # fmt: skip


def _chosen(folder: Path, *, weights: bool) -> dict[str, str]:
    """Digests of the weights, or of all other files; of the lock file without the weights' digests."""
    found = {name: digest for name, digest in tree(folder).items() if name.endswith(".safetensors") == weights}
    if not weights:
        lock = json.loads((folder / LOCK).read_text())
        lock["output"].pop("tensors")
        files = {name: facts for name, facts in lock["output"]["files"].items() if not name.endswith(".safetensors")}
        found[LOCK] = json.dumps({**lock, "output": files}, sort_keys=True)
    return found


def memory_is_bounded(subject: Subject) -> None:
    """On a large model the peak of memory stays below what the plan says, whatever the size of the model."""
    found = probed(subject)[0].part("memory")
    if not found:
        raise NotApplicable("it works by itself, or its parameters fit no larger model")
    if "refused" in found:
        raise NotApplicable(f"refused on a large model ({found['refused']})")
    demand(
        found["grown"] <= found["bound"], "it holds more memory than streaming needs",
        expected=f"at most {found['bound'] >> 20} MiB beside torch", found=f"{found['grown'] >> 20} MiB",
        remedy="load tensors inside operations (`prepare` and the function of rows), not in `patch` or `apply`",
    )  # fmt: skip


def writes_nowhere_else(subject: Subject) -> None:
    """A step writes into the output, run.cache and run.state, and nowhere else."""
    for one in probed(subject):
        found = one.part("applied")
        demand(
            not found["written"],
            "something is written outside the output",
            found=named(found["written"]),
            remedy="write into run.cache (gone after the run) or run.state, and return files in the patch",
        )
        demand(
            not found["left"],
            "files are left behind",
            found=named(found["left"]),
            remedy="write into run.cache (gone after the run) or run.state, and return files in the patch",
        )


@cache
def _large_base() -> Path:
    """A llama of 150 MB with the hidden size, the heads and the vocabulary of the tiny one, made without torch."""
    from regraft.core.testing.conformance.subject import workshop

    folder = workshop() / "large"
    folder.mkdir()
    config = {
        **CONFIGS["llama"], "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32",
        "num_hidden_layers": _LARGE_LAYERS, "intermediate_size": _LARGE_ROWS, "head_dim": 16, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_bytes(dump(config))
    specs = _large_specs()
    pattern = _values()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(render_header(specs, {"format": "pt"}))
        for spec in specs:
            file.write(pattern * (spec.nbytes // len(pattern)) + pattern[: spec.nbytes % len(pattern)])
    return folder


def _values() -> bytes:
    """4 KiB of float32 between -0.05 and 0.05."""
    from array import array

    return array("f", [((index * 37) % 101 - 50) / 1000 for index in range(1024)]).tobytes()


def _large_specs() -> list[TensorSpec]:
    hidden, rows = 64, _LARGE_ROWS
    shapes = {
        "model.embed_tokens.weight": (128, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (128, hidden),
    }
    layer = {
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden), "self_attn.o_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (32, hidden), "self_attn.v_proj.weight": (32, hidden),
        "mlp.gate_proj.weight": (rows, hidden), "mlp.up_proj.weight": (rows, hidden),
        "mlp.down_proj.weight": (hidden, rows),
    }  # fmt: skip
    for index in range(_LARGE_LAYERS):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return [TensorSpec(name, "F32", shape) for name, shape in shapes.items()]
