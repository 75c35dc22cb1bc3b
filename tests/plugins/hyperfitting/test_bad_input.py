"""What a user can get wrong: the exit code, one message, nothing written. Read the messages when they change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.faults import failed
from tests.cli.snapshots import normal
from tests.plugins.hyperfitting.support import SHORT, sentences
from tests.running import regraft, tree, write_recipe

SNAPSHOTS = Path(__file__).parent / "snapshots"
KEPT = ".out.regraft"
"""What a training that failed keeps beside the target, to go on from."""
CASES: dict[str, tuple[int, dict[str, Any], Callable[[], None]]] = {}


def case(code: int, arrange: Callable[[], None] = lambda: None, **values: Any) -> None:
    """Parameters, under a name, that end with `code`."""
    CASES[values.pop("name")] = (code, values, arrange)


def write(name: str, text: str) -> Callable[[], None]:
    return lambda: Path(name).write_text(text) and None


def edit_config(**changes: Any) -> Callable[[], None]:
    def edit() -> None:
        path = Path("base/config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def no_tokenizer() -> None:
    for path in Path("base").glob("tokenizer*"):
        path.unlink()


def not_finite() -> None:
    """A base that computes no number, though its weights are finite: fp32 overflows in its head."""
    from safetensors.torch import load_file, save_file

    for path in Path("base").glob("*.safetensors"):
        tensors = load_file(path)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"].mul_(1e38)
            save_file(tensors, path, {"format": "pt"})


def float8() -> None:
    import torch
    from safetensors.torch import load_file, save_file

    for path in Path("base").glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("mlp.up_proj.weight"):
                tensors[name] = tensor.to(torch.float8_e4m3fn)
        save_file(tensors, path, {"format": "pt"})


PAIRS = "".join(json.dumps({"prompt": "ab", "chosen": f"{n} yes", "rejected": f"{n} no"}) + "\n" for n in range(40))

case(2, name="no_such_data", data="nothing.txt")
case(2, name="no_such_held_out_data", held_out="nothing.txt")
case(3, write("empty.txt", ""), name="empty_data", data="empty.txt")
case(2, write("data.xyz", "abc"), name="data_of_another_kind", data="./data.xyz")
case(3, write("rows.jsonl", '{"text": "abc"}\n{"text": 5}\n'), name="a_bad_row", data="rows.jsonl")
case(2, write("rows.jsonl", PAIRS), name="preference_pairs", data="rows.jsonl")
case(3, write("short.txt", "a few words only, far from enough"), name="fewer_sequences_than_a_batch", data="short.txt")
case(3, name="everything_held_out", held_out=400)
case(2, name="held_out_beyond_one", held_out=1.5)
case(2, name="held_out_below_zero", held_out=-1)
case(2, name="longer_than_the_window", seq_len=129)
case(2, name="continuation_beyond_the_window", report={"context": 24, "ttr_window": 12, "new_tokens": 105})
case(2, name="prompt_beyond_the_window",
     report={"prompts": ["bees and honey " * 8], "ttr_window": 12, "new_tokens": 16})  # fmt: skip
case(2, name="ttr_window_beyond_the_continuation", report={"new_tokens": 16})
case(2, name="context_longer_than_a_sequence", report={"context": 25})
case(2, name="an_empty_prompt", report={"prompts": [""]})
case(2, name="length_in_the_data", data={"source": "text.txt", "max_tokens": 24})
case(2, name="rows_in_the_data", data={"source": "text.txt", "max_rows": 8})
case(2, name="no_data", data=None)
case(2, name="negative_rate", lr=-1e-6)
case(2, name="unknown_optimizer", optimizer="adam")
case(2, name="unknown_key", learning_rate=1e-6)
case(2, name="unknown_key_of_the_report", report={"ttr": 96})
case(1, name="loss_not_finite", lr=1e30)
case(1, not_finite, name="base_not_finite")
case(2, write("rows.jsonl", PAIRS), name="preference_pairs_unpacked", data="rows.jsonl", pack=False, seq_len=4,
     report={"samples": 0})  # fmt: skip
case(3, no_tokenizer, name="no_tokenizer")
case(1, float8, name="float8_weights")
case(1, edit_config(auto_map={"AutoModelForCausalLM": "modeling_own.Own"}), name="code_that_is_not_trusted")


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, workplace: Path) -> None:
    code, values, arrange = CASES[name]
    Path("text.txt").write_text(sentences(12))
    arrange()
    given = {"use": "hyperfitting", "data": "text.txt", **SHORT, **values}
    step = {key: value for key, value in given.items() if value is not None}
    recipe = write_recipe(Path("recipe.toml"), "base", path="out")
    recipe.write_text(recipe.read_text().replace("[output]", "[[steps]]\n" + toml(step) + "[output]"))
    before = tree(workplace)
    ran = regraft("apply", "recipe.toml")
    message = ran.err[ran.err.index("error: ") :]
    failed(type(ran)(ran.code, ran.out, message), code)
    assert {path: sha for path, sha in tree(workplace).items() if not path.startswith(KEPT)} == before
    compare(name, message, workplace)


def toml(values: dict[str, Any]) -> str:
    """Keys and values as TOML, tables inline."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{key} = {text(item)}" for key, item in value.items()) + " }"
        return json.dumps(value)

    return "".join(f"{key} = {text(value)}\n" for key, value in values.items())


def compare(name: str, message: str, folder: Path) -> None:
    found, path = normal(message, folder), SNAPSHOTS / f"{name}.txt"
    if os.environ.get("REGRAFT_UPDATE_SNAPSHOTS") == "1":
        path.write_text(found)
    assert path.is_file(), f"no snapshot {path.name}: run with REGRAFT_UPDATE_SNAPSHOTS=1 and look at it"
    assert found == path.read_text()


def test_no_snapshot_is_left_over() -> None:
    assert {path.stem for path in SNAPSHOTS.glob("*.txt")} == set(CASES)
