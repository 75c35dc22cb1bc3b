"""The streaming writer: pulls every output tensor, row by row, from the last overlay into preallocated files.

Each worker takes one tensor at a time and reads, computes, rounds and writes it in chunks that depend on the tensor's
spec alone; so the bytes are the same for any number of workers, and memory is bounded by chunks and by the largest
tensor that must be computed whole.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.core.buffers import phased_empty, reading, write_from
from regraft.core.errors import PluginError, RegraftError, ResourceError, TransformationError
from regraft.core.finite import NonFinite, count_in, count_non_finite, looks_finite
from regraft.core.layout import Layout, Shard, specs_of
from regraft.core.operations import leaves
from regraft.core.output_file import OutputFile, creating, link, resources
from regraft.core.specs import torch_dtype
from regraft.core.tensors import LazyTensor, check_rows, row_chunks
from regraft.core.transfer import Hasher, clone_file, copy_range, hash_range, labelled, new_hasher, preallocate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WriteOptions:
    """How to write, apart from what.

    Args:
        device: where operations run.
        threads: workers; the bytes do not depend on it.
        link: hard-link shards that equal an input file instead of copying them.
        digest: `xxh3`, `sha256` or `none`.
        durable: flush every file to the disk.
        strict: refuse NaN and Inf in what a step reads, instead of counting them.
    """

    device: str = "cpu"
    threads: int = 2
    link: bool = False
    digest: str = "xxh3"
    durable: bool = True
    strict: bool = False


@dataclass
class WriteReport:
    """What was written: digests of outputs and of the inputs that were read, bytes, and non-finite values."""

    digests: dict[str, str | None] = field(default_factory=dict)
    input_digests: dict[str, str | None] = field(default_factory=dict)
    copied_bytes: int = 0
    computed_bytes: int = 0
    linked_bytes: int = 0
    non_finite: dict[str, NonFinite] = field(default_factory=dict)

    def sort(self, layout: Layout) -> None:
        """The order of the layout and of names, whoever was first."""
        self.digests = {name: self.digests[name] for name in specs_of(layout) if name in self.digests}
        self.input_digests = dict(sorted(self.input_digests.items()))
        self.non_finite = dict(sorted(self.non_finite.items()))


class Writer:
    """Writes the shards of one layout into a folder."""

    def __init__(
        self, folder: Path, options: WriteOptions, progress: Callable[[int], None] = lambda nbytes: None
    ) -> None:
        self.folder = folder
        self.options = options
        self.report = WriteReport()
        self._progress = progress
        self._lock = threading.Lock()
        self._whole = threading.Lock()
        self._stop = threading.Event()
        self._outputs: list[OutputFile] = []
        self._counts: dict[str, NonFinite] = {}

    def write(self, layout: Layout) -> WriteReport:
        """Write every shard.

        Raises:
            ResourceError: the disk is full, the target cannot be written or linked, or memory is short.
            TransformationError: a step computes NaN or Inf from finite numbers.
            PluginError: an operation fails, or computes another shape than its edit says.
            InputError: an input cannot be read.
        """
        computes = any(tensor.raw is None for shard in layout.shards for tensor in shard.tensors)
        with (
            resources(self.folder),
            _single_threaded_torch(computes),
            ThreadPoolExecutor(self.options.threads) as pool,
        ):
            try:
                pending = [pool.submit(self._guarded, job) for shard in layout.shards for job in self._jobs(shard)]
                done, _ = wait(pending, return_when=FIRST_EXCEPTION)
                for future in pending:
                    if future in done:
                        future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            finally:
                for output in self._outputs:
                    output.close()
        self.report.sort(layout)
        return self.report

    def _guarded(self, job: Callable[[], None]) -> None:
        if self._stop.is_set():
            return
        try:
            job()
        except BaseException:
            self._stop.set()
            raise

    def _jobs(self, shard: Shard) -> Iterator[Callable[[], None]]:
        path = self.folder / shard.name
        if shard.source is not None:
            yield lambda: self._whole_file(shard, path)
            return
        file = OutputFile(path, shard, durable=self.options.durable)
        self._outputs.append(file)
        if not shard.tensors:
            yield file.done
        for tensor, offset in shard.offsets():
            yield lambda tensor=tensor, offset=offset: self._tensor(tensor, file, offset)  # type: ignore[misc]

    def _whole_file(self, shard: Shard, path: Path) -> None:
        assert shard.source is not None
        if self.options.link:
            link(shard.source, path)
            self._account(linked_bytes=shard.nbytes)
            self.report.digests.update({tensor.spec.name: None for tensor in shard.tensors})
            return
        with reading(shard.source) as source, creating(path) as target:
            cloned = clone_file(source, target)
            ranges = list(shard.offsets())
            if not cloned:
                preallocate(target, shard.nbytes)
                copy_range(source, target, 0, 0, ranges[0][1], where=shard.source)
            for tensor, offset in ranges:
                if self._stop.is_set():
                    return
                hasher, nbytes = self._new_hasher(), tensor.spec.nbytes
                if not cloned:
                    copy_range(source, target, offset, offset, nbytes, hasher, where=shard.source)
                elif hasher:
                    hash_range(source, offset, nbytes, hasher, where=shard.source)
                self._record(tensor, hasher, copied=True)
            if self.options.durable:
                os.fsync(target)

    def _tensor(self, tensor: LazyTensor, file: OutputFile, offset: int) -> None:
        hasher, raw = self._new_hasher(), tensor.raw
        if raw is not None:
            with reading(raw.path) as source:
                copy_range(source, file.open(), raw.offset, offset, raw.nbytes, hasher, where=raw.path)
        elif tensor.row_local:
            self._compute(tensor, file, offset, hasher, row_chunks(tensor.spec))
        else:
            with self._whole:
                self._compute(tensor, file, offset, hasher, iter([(0, tensor.spec.rows)]))
        if self._stop.is_set():
            return
        self._record(tensor, hasher, copied=raw is not None)
        file.done()

    def _compute(
        self,
        tensor: LazyTensor,
        file: OutputFile,
        offset: int,
        hasher: Hasher | None,
        chunks: Iterator[tuple[int, int]],
    ) -> None:
        import torch

        spec, device = tensor.spec, self.options.device
        dtype = torch_dtype(spec.dtype)
        with torch.inference_mode(), _stream(device) as stream:
            with _blaming(spec.name):
                read = tensor.open(device)
            for start, stop in chunks:
                if self._stop.is_set():
                    return
                place = offset + start * spec.row_bytes
                with _blaming(spec.name):
                    rows = check_rows(spec, read(start, stop), stop - start)
                    buffer = _to_host(rows, dtype, place, stream)
                if not looks_finite(buffer.view(dtype)):
                    self._non_finite(tensor, buffer.view(dtype), start, stop)
                write_from(file.open(), buffer, place)
                if hasher is not None:
                    hasher.update(buffer.numpy().data)
                self._progress(len(buffer))
        self._hash_inputs(tensor)

    def _non_finite(self, tensor: LazyTensor, values: torch.Tensor, start: int, stop: int) -> None:
        """NaN or Inf in rows start..stop of an output: counted if an input has them, refused if the step made them."""
        guilty = self._guilty_inputs(tensor, start, stop)
        if not guilty:
            raise TransformationError(
                "the result is not finite",
                where=tensor.spec.name,
                expected="finite numbers",
                found=f"{count_non_finite(values)} in {tensor.spec.dtype}",
                remedy="use a wider [output] dtype, or correct the step's parameters",
            )
        if self.options.strict:
            name, found = next(iter(guilty.items()))
            raise TransformationError(
                "a tensor that a step reads is not finite",
                where=name,
                expected="finite numbers",
                found=found,
                remedy="repair the base, or run without --strict",
            )
        with self._lock:
            self.report.non_finite.update(guilty)

    def _guilty_inputs(self, tensor: LazyTensor, start: int, stop: int) -> dict[str, NonFinite]:
        """Counts in the stored tensors that can have spoilt rows start..stop; where rows correspond, only in these."""
        found = {}
        for name, leaf in leaves(tensor).items():
            aligned = tensor.row_local and leaf.row_local and leaf.spec.rows == tensor.spec.rows
            if aligned and looks_finite(leaf.open()(start, stop)):
                continue
            if name not in self._counts:
                self._counts[name] = count_in(leaf)
            if count := self._counts[name]:
                found[name] = count
        return found

    def _hash_inputs(self, tensor: LazyTensor) -> None:
        """Digest the stored tensors that an output was computed from; they are warm in the page cache."""
        for name, leaf in leaves(tensor).items():
            raw, hasher = leaf.raw, self._new_hasher()
            with self._lock:
                if raw is None or hasher is None or name in self.report.input_digests:
                    continue
                self.report.input_digests[name] = None
            with reading(raw.path) as source:
                hash_range(source, raw.offset, raw.nbytes, hasher, where=raw.path)
            with self._lock:
                self.report.input_digests[name] = labelled(self.options.digest, hasher)

    def _new_hasher(self) -> Hasher | None:
        return None if self.options.digest == "none" else new_hasher(self.options.digest)

    def _record(self, tensor: LazyTensor, hasher: Hasher | None, *, copied: bool) -> None:
        digest = None if hasher is None else labelled(self.options.digest, hasher)
        with self._lock:
            self.report.digests[tensor.spec.name] = digest
        if copied:
            self._account(copied_bytes=tensor.spec.nbytes)
            self._progress(tensor.spec.nbytes)
        else:
            self._account(computed_bytes=tensor.spec.nbytes)

    def _account(self, **nbytes: int) -> None:
        with self._lock:
            for name, count in nbytes.items():
                setattr(self.report, name, getattr(self.report, name) + count)


def _to_host(rows: torch.Tensor, dtype: torch.dtype, place: int, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """The bytes of `rows` in host memory, in phase with the place in the file where they go."""
    nbytes = rows.numel() * dtype.itemsize
    buffer = phased_empty(nbytes, place, pinned=stream is not None)
    buffer.view(dtype).view(rows.shape).copy_(rows, non_blocking=stream is not None)
    if stream is not None:
        stream.synchronize()
    return buffer


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Name the tensor whose operation failed.

    Raises:
        ResourceError: memory is short.
        PluginError: anything else that is not an error of ours.
    """
    try:
        yield
    except RegraftError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise ResourceError(
                "not enough memory to compute a tensor",
                where=name,
                found=str(error).splitlines()[0] if str(error) else None,
                remedy="use fewer --threads, another --device, or a machine with more memory",
            ) from error
        raise PluginError(
            f"an operation failed: {type(error).__name__}: {error}",
            where=name,
            remedy="run again with --traceback and report it to the author of the step's plugin",
        ) from error


@contextmanager
def _single_threaded_torch(computes: bool) -> Iterator[None]:
    """One torch thread for each worker: the workers are the parallelism, and a reduction's bits cannot depend on it."""
    if not computes:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stream(device: str) -> Iterator[torch.cuda.Stream | None]:
    """On CUDA a stream of this worker's own, so that copies and kernels of different workers overlap."""
    if not device.startswith("cuda"):
        yield None
        return
    import torch

    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield stream
