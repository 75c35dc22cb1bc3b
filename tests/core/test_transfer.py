"""Bytes from file to file: offsets, digests, and the ways in which either side fails."""

import errno
import hashlib
import os

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core import transfer
from regraft.core.buffers import CHUNK_BYTES, PAGE_BYTES, write_all
from regraft.core.errors import InputError
from regraft.core.transfer import clone_file, copy_range, hash_range, labelled, new_hasher, preallocate
from tests.helpers import raising

CONTENT = os.urandom(3 * CHUNK_BYTES + 12345)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "x"
    path.write_bytes(CONTENT)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def target(tmp_path):
    descriptor = os.open(tmp_path / "y", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def contents(descriptor):
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


@pytest.mark.parametrize("algorithm", [None, "xxh3", "sha256", "none"])
@pytest.mark.parametrize(
    ("source_offset", "target_offset", "nbytes"),
    [
        (0, 0, len(CONTENT)),
        (3, 0, CHUNK_BYTES),
        (0, 4090, 2 * CHUNK_BYTES + 1),
        (7, 8, 1),
        (5, 5, 0),
        (4096, 4095, 5000),
    ],
)
def test_a_range_is_copied_and_hashed(source, target, algorithm, source_offset, target_offset, nbytes):
    hasher = None if algorithm is None else new_hasher(algorithm)
    copy_range(source, target, source_offset, target_offset, nbytes, hasher)
    expected = CONTENT[source_offset : source_offset + nbytes]
    assert contents(target)[target_offset:] == expected
    if algorithm == "xxh3":
        assert labelled(algorithm, hasher) == f"xxh3:{xxhash.xxh3_128_hexdigest(expected)}"
    elif algorithm == "sha256":
        assert labelled(algorithm, hasher) == f"sha256:{hashlib.sha256(expected).hexdigest()}"
    elif algorithm == "none":
        assert labelled(algorithm, hasher) is None


@given(offset=st.integers(0, len(CONTENT)), nbytes=st.integers(0, 2 * CHUNK_BYTES))
@settings(deadline=None, max_examples=30)
def test_a_range_is_hashed(source, offset, nbytes):
    nbytes = min(nbytes, len(CONTENT) - offset)
    hasher = new_hasher("xxh3")
    hash_range(source, offset, nbytes, hasher)
    assert hasher.hexdigest() == xxhash.xxh3_128_hexdigest(CONTENT[offset : offset + nbytes])


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM])
def test_where_the_kernel_cannot_copy_we_do(source, target, monkeypatch, code):
    monkeypatch.setattr(os, "copy_file_range", raising(code))
    copy_range(source, target, 11, 3, CHUNK_BYTES + 17)
    assert contents(target)[3:] == CONTENT[11 : 11 + CHUNK_BYTES + 17]


def test_a_kernel_that_stops_half_way_is_continued(source, target, monkeypatch):
    real = os.copy_file_range

    def once(*arguments):
        monkeypatch.setattr(os, "copy_file_range", raising(errno.EXDEV))
        return real(*arguments[:2], 1000, *arguments[3:])

    monkeypatch.setattr(os, "copy_file_range", once)
    copy_range(source, target, 0, 0, 5000)
    assert contents(target) == CONTENT[:5000]


def test_short_reads_and_writes_are_continued(source, target, monkeypatch):
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: read(file, [views[0][:777]], offset))
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:333], offset))
    hasher = new_hasher("xxh3")
    copy_range(source, target, 1, 2, 5000, hasher)
    assert contents(target)[2:] == CONTENT[1:5001]
    assert hasher.hexdigest() == xxhash.xxh3_128_hexdigest(CONTENT[1:5001])


@pytest.mark.parametrize("algorithm", [None, "xxh3"])
def test_a_source_that_ends_early_is_an_input_error(source, target, algorithm):
    hasher = None if algorithm is None else new_hasher(algorithm)
    with pytest.raises(InputError, match="ended while it was read") as caught:
        copy_range(source, target, len(CONTENT) - 100, 0, 200, hasher, where="base.safetensors")
    assert caught.value.where == "base.safetensors"
    assert caught.value.found == "100 bytes"


def test_hashing_past_the_end_is_an_input_error(source):
    with pytest.raises(InputError, match="ended while it was read"):
        hash_range(source, len(CONTENT) - 1, 2, new_hasher("none"), where="base.safetensors")


def test_a_source_that_cannot_be_read_is_an_input_error(source, monkeypatch):
    monkeypatch.setattr(os, "preadv", raising(errno.EIO))
    with pytest.raises(InputError, match="Input/output error") as caught:
        hash_range(source, 0, 10, new_hasher("none"), where="base.safetensors")
    assert caught.value.where == "base.safetensors"


@pytest.mark.parametrize("algorithm", [None, "xxh3"])
def test_a_target_that_is_full_stays_an_error_of_the_system(source, target, monkeypatch, algorithm):
    monkeypatch.setattr(os, "copy_file_range", raising(errno.ENOSPC))
    monkeypatch.setattr(os, "pwrite", raising(errno.ENOSPC))
    hasher = None if algorithm is None else new_hasher(algorithm)
    with pytest.raises(OSError, match="No space left") as caught:
        copy_range(source, target, 0, 0, 10, hasher)
    assert caught.value.errno == errno.ENOSPC


def test_a_clone_shares_or_says_that_it_cannot(source, target):
    cloned = clone_file(source, target)
    assert cloned in (True, False)
    assert contents(target) == (CONTENT if cloned else b"")


@pytest.mark.parametrize(("result", "cloned"), [(lambda *arguments: 0, True), (raising(errno.EXDEV), False)])
def test_clones_follow_the_kernel(source, target, monkeypatch, result, cloned):
    monkeypatch.setattr(transfer.fcntl, "ioctl", result)
    assert clone_file(source, target) is cloned


def test_a_clone_that_fails_for_another_reason_fails(source, target, monkeypatch):
    monkeypatch.setattr(transfer.fcntl, "ioctl", raising(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        clone_file(source, target)


def test_space_is_reserved(target):
    preallocate(target, 1_000_000)
    found = os.fstat(target)
    assert found.st_size == 1_000_000
    assert found.st_blocks * 512 >= 1_000_000


def test_where_space_cannot_be_reserved_the_size_is_set(target, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", raising(errno.EOPNOTSUPP))
    preallocate(target, 1_000_000)
    assert os.fstat(target).st_size == 1_000_000


def test_a_full_disk_shows_when_space_is_reserved(target, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", raising(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        preallocate(target, 1_000_000)


def test_everything_is_written(target, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:7], offset))
    write_all(target, b"a longer line than seven bytes", 5)
    assert contents(target) == bytes(5) + b"a longer line than seven bytes"


@given(source_offset=st.integers(0, 1 << 40), target_offset=st.integers(0, 1 << 40))
def test_the_buffer_of_a_copy_is_never_a_few_bytes_out_of_phase(source_offset, target_offset):
    phase = transfer._phase(source_offset, target_offset)
    assert 0 <= phase < PAGE_BYTES
    aligned = (source_offset - target_offset) % PAGE_BYTES == 0
    for offset in (source_offset, target_offset):
        distance = (offset - phase) % PAGE_BYTES
        assert (distance == 0 and aligned) or not aligned
        assert not 0 < min(distance, PAGE_BYTES - distance) < 64
