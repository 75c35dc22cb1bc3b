"""Literals only, self-contained code only, and a proof that reloads in a process without regraft."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import PluginError, Unsupported
from regraft.core.portable_code import code_patch, portable_code, prove, read_template, refuse_other_code
from tests.families import save_tiny

SAFE = "abcXYZ019_.,:/ -"
literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(SAFE),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(SAFE), inner),
    max_leaves=8,
)

MODELING = """
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
$extra_first

AttentionInterface.register($name, sdpa_attention_forward)
AttentionMaskInterface.register($name, sdpa_mask)


class Mine(transformers.LlamaForCausalLM):
    scale = $scale
"""


@given(value=literals)
def test_what_goes_in_comes_out(value: Any) -> None:
    code = portable_code("VALUE = $value\nAGAIN = [$value]\n", {"value": value})
    first, again = (ast.literal_eval(node.value) for node in ast.parse(code).body)
    assert first == value
    assert repr(first) == repr(value)
    assert again == [value]


class Evil(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return "__import__('os').system('true')"


@pytest.mark.parametrize(
    "value",
    [
        'a"b', "a'b", "a\\b", "a\nb", "$x", "{x}", "a;b", "a(b)", "é", "a\0",
        float("nan"), float("inf"), 1j, b"a", {1}, pytest.param(object(), id="object"), int, Evil("x"), np.int64(1),
        np.float32(1), Path("a"),
        {1: 2}, {"a'": 1}, [1, ["'"]], ({"a": float("nan")},),
    ],
    ids=repr,
)  # fmt: skip
def test_nothing_but_plain_literals(value: Any) -> None:
    with pytest.raises(PluginError, match="only plain literals") as refusal:
        portable_code("VALUE = $value\n", {"value": value})
    assert refusal.value.where == "$value"


@pytest.mark.parametrize(
    ("template", "given_literals", "reason"),
    [
        ("A = $a\n", {}, "placeholder without a literal"),
        ("A = 1\n", {"a": 1}, "literal has no placeholder"),
        ("A = = $a\n", {"a": 1}, "not valid Python"),
        ("import regraft\nA = $a\n", {"a": 1}, "not self-contained"),
        ("from regraft.core import errors\nA = $a\n", {"a": 1}, "not self-contained"),
        ("def f():\n    import numpy\nA = $a\n", {"a": 1}, "not self-contained"),
        ("from . import x\nA = $a\n", {"a": 1}, "not self-contained"),
    ],
)
def test_templates_that_are_refused(template: str, given_literals: dict[str, Any], reason: str) -> None:
    with pytest.raises(PluginError, match=reason):
        portable_code(template, given_literals)


def test_a_package_that_the_user_installs_is_imported_if_it_is_named() -> None:
    assert portable_code("import faiss\n", {}, extra=frozenset({"faiss"})) == b"import faiss\n"
    with pytest.raises(PluginError, match="not self-contained"):
        portable_code("import numpy\n", {}, extra=frozenset({"faiss"}))


def test_a_template_that_is_not_there() -> None:
    with pytest.raises(PluginError, match="missing from the installation"):
        read_template("regraft.plugins.context_extension", "nothing.py.template")


def test_the_keys_under_which_transformers_finds_the_class() -> None:
    patch = code_patch("modeling_mine", "Mine", b"x = 1\n", attn_implementation="mine")
    assert patch.config == {
        "architectures": ["Mine"],
        "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"},
        "attn_implementation": "mine",
    }
    assert patch.files["modeling_mine.py"].read() == b"x = 1\n"
    assert "attn_implementation" not in code_patch("modeling_mine", "Mine", b"").config
    with pytest.raises(PluginError, match="no Python name"):
        code_patch("../modeling", "Mine", b"")


def checkpoint_with(config: dict[str, Any]) -> Checkpoint:
    return Checkpoint("base", {}, {"config.json": FileRef(data=json.dumps(config).encode())})


def test_other_peoples_code_is_refused_and_a_tokenizers_is_not() -> None:
    refuse_other_code(checkpoint_with({"auto_map": {"AutoTokenizer": ["a.B", None]}, "attn_implementation": "sdpa"}))
    refuse_other_code(checkpoint_with({"auto_map": None}))
    for config in ({"auto_map": {"AutoModel": "a.B"}}, {"attn_implementation": "mine"}):
        with pytest.raises(Unsupported) as refusal:
            refuse_other_code(checkpoint_with(config))
        assert refusal.value.remedy


def written(folder: Path, *, first: bytes = b"pass", fail_closed: bool = True, **literals: Any) -> Path:
    """A tiny llama whose class is the template's, with `first` among its imports."""
    save_tiny("llama", folder)
    code = portable_code(MODELING, {"name": "mine", "scale": 1.5, "extra_first": 0, **literals})
    patch = code_patch("modeling_mine", "Mine", code.replace(b"\n0\n", b"\n" + first + b"\n", 1),
                       attn_implementation="mine" if fail_closed else None)  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **patch.config}))
    for name, file in patch.files.items():
        (folder / name).write_bytes(file.read())
    return folder


CLEAN = b"""
import os, sys
try:
    import regraft.core
    raise SystemExit("regraft can be imported")
except ModuleNotFoundError:
    pass
try:
    input()
    raise SystemExit("stdin is open")
except EOFError:
    pass
if os.environ.get("HF_HUB_OFFLINE") != "1" or not sys.flags.isolated:
    raise SystemExit("not offline or not isolated")
"""


def test_a_checkpoint_that_works_without_regraft(tmp_path: Path) -> None:
    proof = prove(written(tmp_path / "good", first=CLEAN))
    assert proof.ok, proof.error
    assert proof.report["class"] == "Mine"
    assert proof.report["finite"] is True
    assert "ValueError" in proof.report["untrusted"]
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_code_that_needs_regraft_is_no_success(tmp_path: Path) -> None:
    proof = prove(written(tmp_path / "bad", first=b"import regraft.core"), forward=False)
    assert not proof.ok
    assert "regraft" in proof.error


def test_a_method_that_would_be_dropped_silently_is_no_success(tmp_path: Path) -> None:
    """The stock class loads and the key is there, but nothing refuses: transformers knows `sdpa`."""
    folder = written(tmp_path / "open", fail_closed=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "sdpa"}))
    proof = prove(folder, forward=False)
    assert not proof.ok
    assert "silently" in proof.error


def test_missing_weights_are_no_success(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = written(tmp_path / "short")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    proof = prove(folder, forward=False)
    assert not proof.ok
    assert "model.norm.weight" in proof.error
