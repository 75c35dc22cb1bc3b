"""Headers: what is rendered is what is read, by us and by the reference implementation."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from regraft.core.errors import InputError, PluginError
from regraft.core.header import MAX_HEADER_BYTES, parse_header, read_header, render_header
from regraft.core.specs import ITEM_BYTES, TensorSpec
from tests.checkpoints import entry, file_bytes

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def specs(draw):
    names = draw(st.lists(NAMES, unique=True, max_size=8))
    return [TensorSpec(name, draw(st.sampled_from(sorted(ITEM_BYTES))), draw(SHAPES)) for name in names]


@given(specs=specs(), metadata=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text("añ☃")))
@settings(deadline=None)
def test_a_rendered_header_reads_back(tmp_path_factory, specs, metadata):
    rendered = render_header(specs, metadata)
    assert len(rendered) % 8 == 0
    total = len(rendered) + sum(spec.nbytes for spec in specs)
    header = parse_header(tmp_path_factory.getbasetemp() / "x", rendered[8:], total)
    assert dict(header.metadata) == metadata
    assert header.data_offset == len(rendered)
    assert header.file_bytes == total
    assert {name: item.spec for name, item in header.entries.items()} == {spec.name: spec for spec in specs}
    offset = len(rendered)
    for spec in specs:
        assert header.entries[spec.name].offset == offset
        offset += spec.nbytes


@given(specs=specs())
@settings(deadline=None, max_examples=50)
def test_the_reference_reads_a_rendered_header(tmp_path_factory, specs):
    path = tmp_path_factory.getbasetemp() / "rendered.safetensors"
    path.write_bytes(render_header(specs, {"format": "pt"}) + bytes(sum(spec.nbytes for spec in specs)))
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        assert {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()} == {
            spec.name: (spec.dtype, spec.shape) for spec in specs
        }
    assert set(read_header(path).entries) == {spec.name for spec in specs}


def test_entries_come_in_the_order_of_their_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    header = {"c": entry("U8", [1], 3, 4), "a": entry("U8", [3], 0, 3), "empty": entry("U8", [0], 3, 3)}
    path.write_bytes(file_bytes(header, bytes(4)))
    assert list(read_header(path).entries) == ["a", "empty", "c"]


def test_an_odd_header_length_and_spaces_around_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    text = b" " + json.dumps({"a": entry("F32", [1], 0, 4)}).encode() + b"  \n"
    path.write_bytes(file_bytes(text, bytes(4)))
    found = read_header(path)
    assert found.entries["a"].offset == 8 + len(text)


def test_a_file_without_tensors_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(render_header([], {}))
    assert not read_header(path).entries


@pytest.mark.parametrize("name", ["nothing.safetensors", "."])
def test_what_cannot_be_opened_is_an_input_error(tmp_path, name):
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_header(tmp_path / name)
    assert caught.value.remedy


def test_a_header_past_the_bound_is_refused_even_if_the_file_is_large_enough(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(path, 2 * MAX_HEADER_BYTES)
    with pytest.raises(InputError, match="too large"):
        read_header(path)


def test_the_place_of_an_unprintable_name_is_shown_escaped(tmp_path):
    name = "\x1b[2J" + "x" * 500
    text = json.dumps({name: entry("F31", [1], 0, 1)}).encode()
    with pytest.raises(InputError) as caught:
        parse_header(tmp_path / "x.safetensors", text, 8 + len(text) + 1)
    assert "\x1b" not in str(caught.value)
    assert len(caught.value.where) < 200 + len(str(tmp_path))


@pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"]])
@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_names_that_a_file_cannot_hold_are_not_rendered(names, metadata):
    with pytest.raises(PluginError, match="cannot hold"):
        render_header([TensorSpec(name, "U8", (1,)) for name in names], metadata)
