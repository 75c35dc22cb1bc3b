"""The streaming writer when numbers are not finite, disks are full, operations fail and files vanish."""

import errno
import os
import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, PluginError, ResourceError, TransformationError, UsageError
from regraft.core.finite import NonFinite
from regraft.core.operations import Convert, Operation, ScaleRows, Value
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.sources.folder import SINGLE, open_folder
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor
from tests.checkpoints import bits, read_all, write_checkpoint
from tests.core.writing import QUICK, Flip, changed, edited, tensors, write
from tests.helpers import descriptors, run_python

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Raises(Operation):
    """Fails when it is prepared, or when rows are asked for."""

    error: Exception
    early: bool = False

    def prepare(self, device):
        if self.early:
            raise self.error

        def fail(start, stop):
            raise self.error

        return fail


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_folder(write_checkpoint(tmp_path_factory.mktemp("base"), tensors(), shards=3), label="base")


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / ".target.regraft" / "output"
    folder.mkdir(parents=True)
    return folder


# NaN and Inf


def spoilt(rows=400_000):
    """Several chunks, with bad values in the first and the last."""
    values = torch.ones(rows, 2)
    values[3, 0], values[-1, 1] = NAN, -INF
    return values


@pytest.mark.parametrize("operation", [Convert("x"), Flip("x")], ids=["row by row", "whole"])
def test_bad_values_of_the_input_are_counted(tmp_path, out, operation):
    base = open_folder(write_checkpoint(tmp_path / "m", {"x": spoilt(), "y": torch.ones(2)}), label="m")
    report = write(edited(base, "x", operation, dtype="BF16"), out)
    assert report.non_finite == {"x": NonFinite(nan=1, inf=1)}
    expected = spoilt().flip(0) if isinstance(operation, Flip) else spoilt()
    assert bits(read_all(out)["x"]) == bits(expected.bfloat16())


def test_bad_values_are_counted_under_the_name_in_the_base(tmp_path, out):
    base = open_folder(write_checkpoint(tmp_path / "m", {"x": spoilt(8)}), label="m")
    moved = overlay(base, Patch(renames={"new": "x"}), by="one")
    assert write(edited(moved, "new", Convert("new"), dtype="F16"), out).non_finite == {"x": NonFinite(1, 1)}


def test_strict_refuses_bad_values_of_the_input(tmp_path, out):
    base = open_folder(write_checkpoint(tmp_path / "m", {"x": spoilt(8)}), label="m")
    with pytest.raises(TransformationError, match="that a step reads is not finite") as caught:
        write(edited(base, "x", Convert("x"), dtype="F16"), out, replace(QUICK, strict=True))
    assert caught.value.where == "x"
    assert caught.value.found == "1 NaN, 1 Inf"


def test_bad_values_that_no_step_reads_are_copied(tmp_path, out):
    base = open_folder(write_checkpoint(tmp_path / "m", {"x": spoilt(8), "y": torch.ones(2)}), label="m")
    report = write(edited(base, "y", Convert("y"), dtype="F16"), out, replace(QUICK, strict=True))
    assert report.non_finite == {}


def large():
    return torch.tensor([[1.0, 2.0], [1e6, 3.0]])


@pytest.mark.parametrize(
    "build",
    [
        lambda base: edited(base, "x", Convert("x"), dtype="F16"),
        lambda base: edited(base, "x", Flip("x"), dtype="F16"),
        lambda base: overlay(edited(base, "x", Convert("x"), dtype="F16"), Patch(renames={"y": "x"}), by="s"),
        lambda base: edited(base, "x", ScaleRows("x", MemoryTensor("f", torch.tensor([1.0, NAN])))),
        lambda base: edited(base, "x", Value(MemoryTensor("v", torch.tensor([[INF, 0.0], [0.0, 0.0]])))),
    ],
    ids=["cast", "whole", "renamed", "operand", "value"],
)
def test_bad_values_that_a_step_makes_are_refused(tmp_path, out, build):
    base = open_folder(write_checkpoint(tmp_path / "m", {"x": large()}), label="m")
    with pytest.raises(TransformationError, match="the result is not finite") as caught:
        write(build(base), out)
    assert caught.value.where in "xy"
    assert caught.value.remedy


def test_a_bad_value_elsewhere_does_not_excuse_an_overflow(tmp_path, out):
    values = torch.ones(400_000, 2)
    values[0, 0], values[-1, 0] = NAN, 1e6
    base = open_folder(write_checkpoint(tmp_path / "m", {"x": values}), label="m")
    with pytest.raises(TransformationError, match="the result is not finite") as caught:
        write(edited(base, "x", Convert("x"), dtype="F16"), out)
    assert caught.value.found == "0 NaN, 1 Inf in F16"


# Failures


def failing(code, after=0):
    """Fails with `code` from call number `after` on."""
    calls = []

    def fail(real):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) > after:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        return call

    return fail


@pytest.mark.parametrize(
    ("name", "after"),
    [("posix_fallocate", 0), ("posix_fallocate", 1), ("pwrite", 0), ("pwrite", 3), ("copy_file_range", 0)],
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_resource_error_and_nothing_stays_open(base, out, monkeypatch, name, after, code):
    before = descriptors()
    monkeypatch.setattr(os, name, failing(code, after)(getattr(os, name)))
    options = replace(QUICK, digest="none" if name == "copy_file_range" else "xxh3")
    with pytest.raises(ResourceError, match="disk is full") as caught:
        write(changed(base), out, options, shard_bytes=100_000)
    assert caught.value.exit_code == 4
    assert caught.value.where == str(out.parent.parent)
    assert descriptors() <= before


def test_a_failing_disk_while_flushing_is_a_resource_error(base, out, monkeypatch):
    before = descriptors()
    monkeypatch.setattr(os, "fsync", failing(errno.EIO)(os.fsync))
    with pytest.raises(ResourceError, match="cannot be written: Input/output error"):
        write(changed(base), out, replace(QUICK, durable=True))
    assert descriptors() <= before


def test_a_limit_of_file_size_is_a_resource_error(tmp_path):
    program = """
        import resource, sys
        from pathlib import Path
        from regraft.core.errors import ResourceError
        from regraft.core.layout import lay_out
        from regraft.core.sources.folder import open_folder
        from regraft.core.writer import WriteOptions, Writer

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        base, out = Path(sys.argv[1]), Path(sys.argv[2])
        out.mkdir()
        try:
            Writer(out, WriteOptions(durable=False)).write(lay_out(open_folder(base, label="m"), 1 << 30))
        except ResourceError as error:
            print(error.message)
    """
    base = write_checkpoint(tmp_path / "m", {"x": torch.zeros(100_000)})
    assert run_python(program, base, tmp_path / "out") == "cannot be written: File too large\n"


def test_a_file_in_the_way_is_a_resource_error(base, out):
    (out / "model-00001-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(ResourceError, match="cannot be written: File exists"):
        write(base, out)


@pytest.mark.parametrize("early", [True, False])
def test_an_operation_that_fails_is_named_and_nothing_stays_open(base, out, early):
    before = descriptors()
    checkpoint = edited(base, "a", Raises(IndexError("out of range"), early))
    with pytest.raises(PluginError, match="an operation failed: IndexError: out of range") as caught:
        write(checkpoint, out)
    assert caught.value.where == "a"
    assert isinstance(caught.value.__cause__, IndexError)
    assert descriptors() <= before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), StopIteration(), KeyError("x")])
def test_an_operation_is_to_blame_for_any_error_of_its_own(base, out, error):
    with pytest.raises(PluginError, match="an operation failed"):
        write(edited(base, "a", Raises(error)), out)


def test_an_error_of_ours_passes_through_an_operation(base, out):
    with pytest.raises(UsageError, match="as it is"):
        write(edited(base, "a", Raises(UsageError("as it is"))), out)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    ],
)
def test_short_memory_is_a_resource_error(base, out, error):
    with pytest.raises(ResourceError, match="not enough memory") as caught:
        write(edited(base, "a", Raises(error)), out)
    assert caught.value.where == "a"


@dataclass(frozen=True)
class Gives(Operation):
    """Rows of a shape of its own."""

    shape: tuple[int, ...]

    def prepare(self, device):
        return lambda start, stop: torch.zeros(self.shape)


@pytest.mark.parametrize("shape", [(41, 30), (39, 30), (1200,), (30, 40)])
def test_rows_that_would_damage_the_neighbour_are_refused(base, out, shape):
    with pytest.raises(PluginError, match="another shape"):
        write(edited(base, "a", Gives(shape)), out)


def test_a_tensor_that_breaks_its_promise_is_refused(out):
    class Liar(MemoryTensor):
        def open(self, device="cpu"):
            return lambda start, stop: torch.zeros(stop - start + 1)

    with pytest.raises(PluginError, match="another shape"):
        write(Checkpoint("m", {"x": Liar("x", torch.zeros(4))}, {}), out)


@pytest.mark.parametrize("patch", [Patch(), Patch(renames={"z": "x"})])
def test_a_base_that_vanishes_is_an_input_error(tmp_path, out, patch):
    folder = write_checkpoint(tmp_path / "m", {"x": torch.ones(4), "y": torch.ones(4)})
    base = open_folder(folder, label="m")
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="No such file") as caught:
        write(overlay(base, patch, by="s"), out)
    assert SINGLE in caught.value.where


@pytest.mark.parametrize(
    "patch",
    [Patch(), Patch(renames={"z": "y"}), Patch(edits={"y": Edit(TensorSpec("y", "F16", (100,)), Convert("y"))})],
)
def test_a_base_that_shrinks_is_an_input_error(tmp_path, out, patch):
    folder = write_checkpoint(tmp_path / "m", {"x": torch.ones(100), "y": torch.ones(100)})
    checkpoint = overlay(open_folder(folder, label="m"), patch, by="s")
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 40)
    with pytest.raises(InputError, match="ended while it was read") as caught:
        write(checkpoint, out)
    assert SINGLE in caught.value.where


def test_an_interrupt_stops_the_workers_and_closes_everything(base, out):
    before, calls = descriptors(), []

    def interrupt(nbytes):
        calls.append(nbytes)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(changed(base), out, progress=interrupt)
    assert len(calls) <= QUICK.threads
    assert descriptors() <= before
