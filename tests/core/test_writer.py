"""The streaming writer: the same bytes for any number of workers, honest digests, bounded memory, clean failures."""

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core import writer as writer_module
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, PluginError, ResourceError, TransformationError, UsageError
from regraft.core.finite import NonFinite
from regraft.core.layout import lay_out
from regraft.core.operations import Convert, Operation, ScaleRows, Value
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.sources.folder import SINGLE, open_folder
from regraft.core.specs import ITEM_BYTES, TensorSpec, torch_dtype
from regraft.core.tensors import MemoryTensor
from regraft.core.writer import WriteOptions, Writer
from tests.checkpoints import bits, descriptors, entry, file_bytes, read_all, same_bits, write_checkpoint

QUICK = WriteOptions(threads=2, durable=False)
NAN, INF = float("nan"), float("inf")


def tensors():
    """Some small, one of several chunks, one empty, one scalar, of many dtypes."""
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(3000, 250, generator=generator),
        "a": torch.randn(40, 30, generator=generator).bfloat16(),
        "b": torch.randn(7, 3, 5, generator=generator).half(),
        "norm": torch.randn(40, generator=generator),
        "ids": torch.arange(1000, dtype=torch.int32),
        "codes": torch.arange(255, dtype=torch.uint8).reshape(5, 51),
        "mask": torch.tensor([True, False]),
        "scale": torch.tensor(3.0),
        "nothing": torch.zeros(0, 4),
    }


@dataclass(frozen=True)
class Flip(Operation):
    """The rows in reverse: needs the whole input."""

    input: str
    row_local = False

    @property
    def inputs(self):
        return (self.input,)

    def prepare(self, device):
        return lambda start, stop, rows: rows.flip(0)


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


@dataclass(frozen=True)
class Alone(Flip):
    """Notes how many of its kind compute at once."""

    running: list[int]
    most: list[int]

    def prepare(self, device):
        def flip(start, stop, rows):
            self.running.append(start)
            time.sleep(0.01)
            self.most.append(len(self.running))
            self.running.pop()
            return rows.flip(0)

        return flip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_folder(write_checkpoint(tmp_path_factory.mktemp("base"), tensors(), shards=3), label="base")


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / ".target.regraft" / "output"
    folder.mkdir(parents=True)
    return folder


def changed(base):
    """Every kind of edit at once."""
    factors = MemoryTensor("factors", torch.linspace(0.5, 2, 3000))
    patch = Patch(
        edits={
            "embed": Edit(replace(base.specs["embed"], dtype="BF16"), ScaleRows("embed", factors)),
            "a": Edit(replace(base.specs["a"], dtype="F16"), Convert("a")),
            "b": Edit(base.specs["b"], Flip("b")),
            "new": Edit(TensorSpec("new", "F32", (2, 2)), Value(MemoryTensor("v", torch.ones(2, 2)))),
        },
        removals=frozenset({"mask"}),
        renames={"moved": "ids"},
    )
    return overlay(base, patch, by="s")


def write(checkpoint, folder, options=QUICK, *, shard_bytes=1 << 30, progress=lambda nbytes: None):
    return Writer(folder, options, progress).write(lay_out(checkpoint, shard_bytes))


def in_memory(**values):
    return Checkpoint("m", {name: MemoryTensor(name, value) for name, value in values.items()}, {})


def edited(checkpoint, name, operation, **spec):
    return overlay(checkpoint, Patch(edits={name: Edit(replace(checkpoint.specs[name], **spec), operation)}), by="s")


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 100_000])
def test_the_bytes_and_the_report_do_not_depend_on_the_threads(base, tmp_path, shard_bytes):
    results = []
    for threads in (1, 2, 4):
        folder = tmp_path / str(threads)
        folder.mkdir()
        report = write(changed(base), folder, replace(QUICK, threads=threads), shard_bytes=shard_bytes)
        results.append((folder_bytes(folder), list(report.digests.items()), list(report.input_digests.items()), report))
    assert results[0] == results[1] == results[2]


def test_what_is_written_is_what_the_checkpoint_shows(base, out):
    checkpoint = changed(base)
    write(checkpoint, out)
    assert same_bits(read_all(out), {name: checkpoint.load(name) for name in checkpoint.tensors})


@given(
    contents=st.lists(
        st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)), max_size=6
    ),
    shard_bytes=st.integers(1, 200),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_the_reference_reads_what_is_written(tmp_path_factory, contents, shard_bytes, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    expected = {}
    for number, (code, shape) in enumerate(contents):
        nbytes = TensorSpec("x", code, shape).nbytes
        data = torch.randint(0, 2 if code == "BOOL" else 256, (nbytes,), dtype=torch.uint8, generator=generator)
        expected[f"t{number}"] = data.view(torch_dtype(code)).reshape(shape)
    folder = tmp_path_factory.mktemp("any")
    options = replace(QUICK, threads=threads)
    write(in_memory(**expected), folder, options, shard_bytes=shard_bytes)
    assert same_bits(read_all(folder), expected)
    if len(list(folder.iterdir())) == 1:
        (folder / "config.json").write_text("{}")
        again = open_folder(folder, label="m")
        copy = tmp_path_factory.mktemp("copy")
        write(again, copy, options)
        assert (copy / SINGLE).read_bytes() == (folder / SINGLE).read_bytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_a_cast_is_the_cast_of_torch(base, out, dtype):
    patch = Patch(
        edits={name: Edit(replace(base.specs[name], dtype=dtype), Convert(name)) for name in ("embed", "a", "b")}
    )
    write(overlay(base, patch, by="s"), out)
    written = read_all(out)
    for name in ("embed", "a", "b"):
        assert bits(written[name]) == bits(tensors()[name].to(torch_dtype(dtype)))


@pytest.mark.parametrize("algorithm", ["xxh3", "sha256", "none"])
def test_digests_are_those_of_the_bytes(base, out, algorithm):
    hashes = {"xxh3": xxhash.xxh3_128_hexdigest, "sha256": lambda data: hashlib.sha256(data).hexdigest()}

    def digest(tensor):
        return None if algorithm == "none" else f"{algorithm}:{hashes[algorithm](bits(tensor))}"

    report = write(changed(base), out, replace(QUICK, digest=algorithm))
    assert report.digests == {name: digest(tensor) for name, tensor in read_all(out).items()}
    expected = {name: digest(tensors()[name]) for name in ("a", "b", "embed")}
    assert report.input_digests == ({} if algorithm == "none" else expected)


def test_bytes_are_accounted_for_and_progress_ends_at_the_total(base, out):
    done = []
    report = write(changed(base), out, progress=done.append)
    written = read_all(out)
    total = sum(len(bits(tensor)) for tensor in written.values())
    computed = sum(len(bits(written[name])) for name in ("embed", "a", "b", "new"))
    assert (report.computed_bytes, report.copied_bytes, report.linked_bytes) == (computed, total - computed, 0)
    assert sum(done) == total


def test_untouched_shards_are_copied_byte_for_byte(base, out):
    report = write(base, out)
    assert folder_bytes(out) == {path.name: path.read_bytes() for path in folder_of(base).glob("*.safetensors")}
    assert report.digests["a"] == f"xxh3:{xxhash.xxh3_128_hexdigest(bits(tensors()['a']))}"
    assert report.copied_bytes == sum(spec.nbytes for spec in base.specs.values())


def folder_of(base):
    return base.raw("embed").path.parent


def test_untouched_shards_are_linked_on_demand(base, out):
    layout = lay_out(edited(base, "embed", Convert("embed"), dtype="BF16"), 1 << 30)
    report = Writer(out, replace(QUICK, link=True)).write(layout)
    same = [(out / shard.name).samefile(folder_of(base) / shard.name) for shard in layout.shards]
    assert same == [False, True, True]
    assert report.linked_bytes == sum((out / shard.name).stat().st_size for shard in layout.shards[1:])
    assert report.digests["mask"] is None
    assert report.digests["embed"] is not None


def test_a_link_goes_to_the_file_behind_a_symbolic_link(base, tmp_path, out):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder_of(base).iterdir():
        (snapshot / path.name).symlink_to(path)
    write(open_folder(snapshot, label="m"), out, replace(QUICK, link=True))
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_link_across_file_systems_is_refused(base, out, monkeypatch):
    def fail(source, path):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(ResourceError, match="cannot be linked") as caught:
        write(base, out, replace(QUICK, link=True))
    assert "--link" in caught.value.remedy


@pytest.mark.parametrize("algorithm", ["xxh3", "none"])
def test_a_file_system_that_shares_blocks_is_used(base, out, monkeypatch, algorithm):
    def clone(source, target):
        os.sendfile(target, source, 0, os.fstat(source).st_size)
        return True

    monkeypatch.setattr(writer_module, "clone_file", clone)
    monkeypatch.setattr(writer_module, "copy_range", lambda *arguments, **options: pytest.fail("it is copied too"))
    report = write(base, out, replace(QUICK, digest=algorithm))
    assert folder_bytes(out) == {path.name: path.read_bytes() for path in folder_of(base).glob("*.safetensors")}
    expected = None if algorithm == "none" else f"xxh3:{xxhash.xxh3_128_hexdigest(bits(tensors()['embed']))}"
    assert report.digests["embed"] == expected


def test_a_checkpoint_without_tensors_is_a_file_without_tensors(out):
    report = write(in_memory(), out)
    assert read_all(out) == {}
    assert report.digests == {}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_the_mode_of_files_follows_the_umask(base, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        for name, checkpoint in {"copied": base, "computed": changed(base)}.items():
            (tmp_path / name).mkdir()
            write(checkpoint, tmp_path / name)
            assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / name).iterdir()} == {mode}
    finally:
        os.umask(before)


@pytest.mark.parametrize("durable", [True, False])
def test_every_file_is_flushed_if_that_is_asked(base, out, monkeypatch, durable):
    flushed, real = set(), os.fsync

    def fsync(descriptor):
        flushed.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(edited(base, "embed", Flip("embed")), out, replace(QUICK, durable=durable))
    assert flushed == ({path.name for path in out.iterdir()} if durable else set())


def test_few_files_are_open_at_a_time(out):
    checkpoint = in_memory(**{f"t{number}": torch.full((8,), float(number)) for number in range(60)})
    most = []
    write(
        checkpoint, out, shard_bytes=32,
        progress=lambda nbytes: most.append(sum(str(out) in name for name in descriptors())),
    )  # fmt: skip
    assert len(list(out.iterdir())) == 60
    assert max(most) <= 2 * QUICK.threads


def test_tensors_that_are_computed_whole_are_computed_one_at_a_time(out):
    checkpoint, running, most = in_memory(**{f"t{number}": torch.ones(4) for number in range(8)}), [], []
    edits = {name: Edit(spec, Alone(name, running, most)) for name, spec in checkpoint.specs.items()}
    write(overlay(checkpoint, Patch(edits=edits), by="s"), out, replace(QUICK, threads=4))
    assert most == [1] * 8


def test_the_threads_of_torch_are_given_back(base, out):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        write(changed(base), out, progress=lambda nbytes: seen.append(torch.get_num_threads()))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


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


def run_python(program, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


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


# What it costs


@pytest.mark.parametrize("link", [True, False])
def test_untouched_checkpoints_need_no_torch(base, tmp_path, link):
    program = """
        import sys
        from pathlib import Path
        from regraft.core.layout import lay_out
        from regraft.core.patch import Patch, overlay
        from regraft.core.sources.folder import open_folder
        from regraft.core.writer import WriteOptions, Writer

        below = open_folder(Path(sys.argv[1]), label="m")
        above = overlay(below, Patch(json={"config.json": {"a": 1}}, renames={"z": "mask"}), by="s")
        out = Path(sys.argv[2])
        out.mkdir()
        Writer(out, WriteOptions(link=sys.argv[3] == "True")).write(lay_out(above, 1 << 30))
        print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
    """
    assert run_python(program, folder_of(base), tmp_path / "out", link) == "[]\n"


def test_memory_is_bounded_by_chunks_and_not_by_the_model(tmp_path):
    specs = {
        f"t{number}": entry("BF16", [2560, 4096], number * 20971520, (number + 1) * 20971520) for number in range(14)
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    weights = tmp_path / "m" / SINGLE
    weights.write_bytes(file_bytes(specs))
    os.truncate(weights, weights.stat().st_size + 14 * 20971520)
    program = """
        import sys
        from pathlib import Path
        import torch
        from regraft.core.cast import cast_patch
        from regraft.core.layout import lay_out
        from regraft.core.patch import overlay
        from regraft.core.sources.folder import open_folder
        from regraft.core.writer import WriteOptions, Writer

        def peak():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

        before = peak()
        base = open_folder(Path(sys.argv[1]), label="m")
        out = Path(sys.argv[2])
        out.mkdir()
        layout = lay_out(overlay(base, cast_patch(base, "float16"), by="cast"), 1 << 40)
        report = Writer(out, WriteOptions(durable=False)).write(layout)
        print(report.computed_bytes, peak() - before)
    """
    computed, grown_kib = map(int, run_python(program, tmp_path / "m", tmp_path / "out").split())
    assert computed == 14 * 20971520
    assert grown_kib < (64 + 6) * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_writes_the_same_bytes(base, tmp_path):
    results = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        folder.mkdir()
        report = write(changed(base), folder, replace(QUICK, device=device))
        results.append((folder_bytes(folder), report.digests))
    assert results[0] == results[1]
