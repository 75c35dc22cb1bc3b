"""The streaming writer: the same bytes for any number of workers, honest digests, bounded memory."""

import errno
import hashlib
import os
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core import writer as writer_module
from regraft.core.errors import ResourceError
from regraft.core.layout import lay_out
from regraft.core.operations import Convert
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.sources.folder import SINGLE, open_folder
from regraft.core.specs import ITEM_BYTES, TensorSpec, torch_dtype
from regraft.core.writer import Writer
from tests.checkpoints import bits, entry, file_bytes, read_all, same_bits, write_checkpoint
from tests.core.writing import QUICK, Flip, changed, edited, folder_bytes, in_memory, tensors, write
from tests.helpers import descriptors, run_python


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
