"""What a run meets on the machine: read-only folders, full disks, another run, too little memory."""

import ctypes
import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.faults import failed
from tests.running import ABF, done, regraft, tree, write_recipe

CAST = {"dtype": "bfloat16"}
_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1


def command(*arguments, before=None):
    """`regraft` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "regraft", *arguments], capture_output=True, text=True, preexec_fn=before, check=False
    )  # fmt: skip


def refused(ran, code, *words):
    assert ran.returncode == code, ran.stderr
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n  ") <= 4
    assert "Traceback" not in ran.stderr
    for word in words:
        assert word in ran.stderr


def without_roots_privilege():
    """Root may write everywhere; without this capability rights count for root too."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0)


def test_read_only_target(workplace):
    write_recipe(Path("recipe.toml"), "base", ABF, path="locked/out")
    locked = Path("locked")
    locked.mkdir(mode=0o555)
    probe = subprocess.run(
        [sys.executable, "-c", "import os, sys; sys.exit(os.access('locked', os.W_OK))"],
        preexec_fn=without_roots_privilege,
        check=False,
    )
    if probe.returncode != 0:
        pytest.skip("this root cannot give up its privilege")
    before = tree(workplace)
    refused(command("apply", "recipe.toml", before=without_roots_privilege), 4, "locked/out", "read-only", "remedy")
    assert tree(workplace) == before


def test_a_file_larger_than_the_system_allows(workplace):
    """The kernel's own refusal in the middle of writing, without a file system to fill."""
    write_recipe(Path("recipe.toml"), "base", path="out", **CAST)
    before = tree(workplace)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    refused(command("apply", "recipe.toml", before=limit), 4, "cannot be written: File too large", "remedy")
    assert tree(workplace) == before


@pytest.mark.parametrize("moment", ["preallocate", "tensors", "side files", "records", "commit"])
def test_disk_full_while_writing(workplace, monkeypatch, moment):
    write_recipe(Path("recipe.toml"), "base", path="out", **CAST)
    before = tree(workplace)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    match moment:
        case "preallocate":
            monkeypatch.setattr("regraft.core.output_file.preallocate", full)
        case "tensors":
            monkeypatch.setattr(os, "pwrite", full)
        case "side files":
            monkeypatch.setattr(Path, "write_bytes", full)
        case "records":
            monkeypatch.setattr("regraft.core.execute._write_records", full)
        case "commit":
            monkeypatch.setattr(os, "fsync", full)
    ran = regraft("apply", "recipe.toml")
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    failed(ran, 4)
    assert "disk is full" in ran.err or os.strerror(errno.ENOSPC) in ran.err
    assert tree(workplace) == before


def test_too_little_disk_is_refused_before_writing(workplace, monkeypatch):
    write_recipe(Path("recipe.toml"), "base", ABF, path="out")
    needed = done("plan", "recipe.toml", "--json").json["disk_bytes"]
    usage = shutil.disk_usage(workplace)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=needed - 1))
    before = tree(workplace)
    for verb in ("plan", "apply"):
        ran = regraft(verb, "recipe.toml")
        failed(ran, 4)
        assert f"expected: {needed} bytes free\n  found: {needed - 1} bytes" in ran.err
    assert tree(workplace) == before
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=needed))
    done("apply", "recipe.toml")


def test_linked_shards_need_no_disk(workplace, monkeypatch):
    write_recipe(Path("recipe.toml"), "base", ABF, path="out")
    copied = done("plan", "recipe.toml", "--json").json
    linked = done("plan", "recipe.toml", "--json", "--link").json
    index = copied["weight_files"]["model.safetensors.index.json"]
    assert copied["disk_bytes"] - linked["disk_bytes"] == copied["weight_bytes"] - index
    usage = shutil.disk_usage(workplace)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=linked["disk_bytes"]))
    assert regraft("apply", "recipe.toml").code == 4
    done("apply", "recipe.toml", "--link")


def test_too_little_memory_is_refused_before_writing(workplace, monkeypatch):
    write_recipe(Path("recipe.toml"), "base", path="out", **CAST)
    needed = done("plan", "recipe.toml", "--json").json["memory_bytes"]
    monkeypatch.setattr("regraft.core.requirements.available_memory", lambda: needed - 1)
    before = tree(workplace)
    ran = regraft("apply", "recipe.toml")
    failed(ran, 4)
    assert f"expected: {needed} bytes" in ran.err
    assert "fewer --threads" in ran.err
    assert tree(workplace) == before


def test_two_applies_into_one_target(workplace):
    write_recipe(Path("recipe.toml"), "base", ABF, path="out")
    work = Path(".out.regraft")
    work.mkdir()
    descriptor = os.open(work, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    before = tree(workplace)
    refused(command("apply", "recipe.toml"), 4, "another run is writing this target", "remedy")
    assert tree(workplace) == before
    os.close(descriptor)
    done("apply", "recipe.toml")
    assert not work.exists()


def test_interrupts_leave_nothing(workplace):
    """SIGINT and SIGTERM in the middle of a run: exit code 130, one line, no target, no work folder."""
    write_recipe(Path("recipe.toml"), "base", ABF, path="out")
    before = tree(workplace)
    for number in (signal.SIGINT, signal.SIGTERM):
        code = (
            "import time; from pathlib import Path\n"
            "import regraft.core.execute as e; from regraft.cli.main import run\n"
            "def slow(*a): Path('reached').touch(); time.sleep(60)\n"
            "e._write_records = slow; run(['apply', 'recipe.toml'])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while not Path("reached").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        Path("reached").unlink()
        assert (process.returncode, out) == (130, "")
        assert err.startswith("interrupted")
        assert err.count("\n") == 1
        assert tree(workplace) == before


def test_a_target_filled_while_the_run_goes_on_is_kept(workplace, monkeypatch):
    import regraft.core.execute as execute

    write_recipe(Path("recipe.toml"), "base", ABF, path="out")
    records = execute._write_records

    def meanwhile(*arguments):
        records(*arguments)
        Path("out").mkdir()
        Path("out/thesis.txt").write_text("do not lose")

    monkeypatch.setattr(execute, "_write_records", meanwhile)
    ran = regraft("apply", "recipe.toml")
    failed(ran, 4)
    assert tree(workplace / "out").keys() == {"thesis.txt"}
    assert not Path(".out.regraft").exists()
