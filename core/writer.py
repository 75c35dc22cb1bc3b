"""The streaming writer: pulls every output tensor, row by row, from the last overlay into preallocated files.

Each worker takes one tensor at a time and reads, computes, rounds and writes it in chunks that depend on the tensor's
spec alone; so the bytes are the same for any number of workers, and memory is bounded by chunks and by the largest
tensor that must be computed whole.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.core.buffers import phased_empty, write_from
from regraft.core.errors import ResourceError, TransformationError
from regraft.core.finite import NonFinite, count_non_finite, looks_finite
from regraft.core.layout import Layout, Shard
from regraft.core.operations import ComputedTensor
from regraft.core.specs import torch_dtype
from regraft.core.tensors import LazyTensor, row_chunks
from regraft.core.transfer import Hasher, clone_file, copy_range, hash_range, labelled, new_hasher

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
        self._outputs: list[_Output] = []

    def write(self, layout: Layout) -> WriteReport:
        """Write every shard.

        Raises:
            ResourceError: the disk is full, or the target cannot be written or linked.
            TransformationError: a step computes NaN or Inf from finite numbers.
            InputError: an input cannot be read.
        """
        computes = any(tensor.raw is None for shard in layout.shards for tensor in shard.tensors)
        with (
            _resources(self.folder),
            _single_threaded_torch(computes),
            ThreadPoolExecutor(self.options.threads) as pool,
        ):
            pending = []
            for shard in layout.shards:
                pending += [pool.submit(self._guarded, job) for job in self._jobs(shard)]
            try:
                done, _ = wait(pending, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            finally:
                for output in self._outputs:
                    output.close()
        return self.report

    def _guarded(self, job: Callable[[], None]) -> None:
        if not self._stop.is_set():
            job()

    def _jobs(self, shard: Shard) -> Iterator[Callable[[], None]]:
        path = self.folder / shard.name
        if shard.source is not None:
            yield lambda: self._whole_file(shard, path)
            return
        file = _Output(path, shard, self.options.durable)
        self._outputs.append(file)
        for tensor, offset in shard.offsets():
            yield lambda tensor=tensor, offset=offset: self._tensor(tensor, file, offset)  # type: ignore[misc]

    def _whole_file(self, shard: Shard, path: Path) -> None:
        assert shard.source is not None
        if self.options.link:
            _link(shard.source, path)
            self._account(linked_bytes=shard.nbytes)
            self.report.digests.update({tensor.spec.name: None for tensor in shard.tensors})
            return
        algorithm = self.options.digest
        source, target = os.open(shard.source, os.O_RDONLY), _create(path)
        try:
            cloned = clone_file(source, target)
            ranges = list(shard.offsets())
            if not cloned:
                os.posix_fallocate(target, 0, shard.nbytes)
                copy_range(source, target, 0, 0, ranges[0][1])
            for tensor, offset in ranges:
                hasher = None if algorithm == "none" else new_hasher(algorithm)
                if not cloned:
                    copy_range(source, target, offset, offset, tensor.spec.nbytes, hasher)
                elif hasher:
                    hash_range(source, offset, tensor.spec.nbytes, hasher)
                self._record(tensor, hasher, copied=True)
            if self.options.durable:
                os.fsync(target)
        finally:
            os.close(source)
            os.close(target)

    def _tensor(self, tensor: LazyTensor, file: _Output, offset: int) -> None:
        hasher = None if self.options.digest == "none" else new_hasher(self.options.digest)
        raw = tensor.raw
        if raw is not None:
            source = os.open(raw.path, os.O_RDONLY)
            try:
                copy_range(source, file.descriptor, raw.offset, offset, raw.nbytes, hasher)
            finally:
                os.close(source)
        elif tensor.row_local:
            self._compute(tensor, file, offset, hasher, row_chunks(tensor.spec))
        else:
            with self._whole:
                self._compute(tensor, file, offset, hasher, iter([(0, tensor.spec.rows)]))
        self._record(tensor, hasher, copied=raw is not None)
        file.done()

    def _compute(
        self, tensor: LazyTensor, file: _Output, offset: int, hasher: Hasher | None, chunks: Iterator[tuple[int, int]]
    ) -> None:
        import torch

        spec, device = tensor.spec, self.options.device
        dtype, on_gpu = torch_dtype(spec.dtype), device.startswith("cuda")
        with torch.inference_mode(), _stream(device) as stream:
            read = tensor.open(device)
            for start, stop in chunks:
                if self._stop.is_set():
                    return
                rows = read(start, stop)
                place = offset + start * spec.row_bytes
                buffer = phased_empty(rows.numel() * rows.element_size(), place, pinned=on_gpu)
                buffer.view(dtype).view(rows.shape).copy_(rows, non_blocking=on_gpu)
                if stream is not None:
                    stream.synchronize()
                values = buffer.view(dtype)
                if not looks_finite(values):
                    self._non_finite(tensor, values)
                write_from(file.descriptor, buffer, place)
                if hasher is not None:
                    hasher.update(memoryview(buffer.numpy()))
                self._progress(len(buffer))
        self._hash_inputs(tensor)

    def _non_finite(self, tensor: LazyTensor, values: torch.Tensor) -> None:
        """NaN or Inf in an output: counted if an input has them too, refused if the step made them."""
        output = count_non_finite(values)
        read = {name: count_non_finite(leaf.load()) for name, leaf in _leaves(tensor).items()}
        guilty = {name: found for name, found in read.items() if found}
        if not guilty:
            raise TransformationError(
                "the result is not finite",
                where=tensor.spec.name,
                expected="finite numbers",
                found=f"{output} in {tensor.spec.dtype}",
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

    def _hash_inputs(self, tensor: LazyTensor) -> None:
        """Digest the stored tensors that an output was computed from; they are warm in the page cache."""
        if self.options.digest == "none":
            return
        for name, leaf in _leaves(tensor).items():
            raw = leaf.raw
            if raw is None or name in self.report.input_digests:
                continue
            hasher = new_hasher(self.options.digest)
            source = os.open(raw.path, os.O_RDONLY)
            try:
                hash_range(source, raw.offset, raw.nbytes, hasher)
            finally:
                os.close(source)
            with self._lock:
                self.report.input_digests[name] = labelled(self.options.digest, hasher)

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


class _Output:
    """An output file that is open while its tensors are being written, and flushed and closed after the last one."""

    def __init__(self, path: Path, shard: Shard, durable: bool) -> None:
        self.descriptor = _create(path)
        self._durable = durable
        self._left = len(shard.tensors)
        self._lock = threading.Lock()
        self._open = True
        os.posix_fallocate(self.descriptor, 0, shard.nbytes)
        os.pwrite(self.descriptor, shard.header, 0)

    def done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            if self._durable:
                os.fsync(self.descriptor)
            self.close()

    def close(self) -> None:
        with self._lock:
            if self._open:
                os.close(self.descriptor)
            self._open = False


def _leaves(tensor: LazyTensor) -> Mapping[str, LazyTensor]:
    """The tensors at the bottom of a computed tensor, by name."""
    if not isinstance(tensor, ComputedTensor):
        return {tensor.spec.name: tensor}
    return {name: leaf for source in tensor.sources for name, leaf in _leaves(source).items()}


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source.resolve(), path)
    except OSError as error:
        raise ResourceError(
            f"cannot be linked: {error.strerror}",
            where=path,
            expected="base and target on one file system",
            remedy="run without --link",
        ) from None


@contextmanager
def _resources(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of the target into words."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "free some space, or choose another [output] path" if full else "check the target's file system and rights"
        )
        raise ResourceError(
            "the disk is full" if full else f"cannot be written: {error.strerror}",
            where=folder.parent.parent,
            remedy=remedy,
        ) from None


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

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield stream
