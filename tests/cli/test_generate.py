"""`regraft generate`: what it prints, and what it refuses."""

import io
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

from regraft.core import generation
from tests.running import done, regraft

SHORT = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", "12")


def test_text_goes_to_stdout_and_the_same_to_json(monkeypatch):
    shown = done("generate", "demo:tiny", "And the LORD", "--raw", *SHORT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"And the LORD\n")))
    told = done("generate", "demo:tiny", "-", "--raw", *SHORT, "--json").json
    assert shown.out == told["text"] + "\n"
    assert shown.err == ""
    assert (told["prompt"], told["chat"], told["new_tokens"], told["stopped"]) == ("And the LORD", False, 12, "length")
    chat = done("generate", "demo:tiny", "And the LORD", *SHORT, "--json").json
    assert chat["chat"] is True
    assert chat["prompt"].endswith("<|assistant|>")


def test_ctrl_c_keeps_what_was_written(monkeypatch):
    choose, asked = generation.choose, []

    def interrupting(*arguments):
        asked.append(1)
        if len(asked) == 4:
            signal.raise_signal(signal.SIGINT)
        return choose(*arguments)

    whole = done("generate", "demo:tiny", "And the LORD", "--raw", *SHORT).out
    monkeypatch.setattr(generation, "choose", interrupting)
    ran = regraft("generate", "demo:tiny", "And the LORD", "--raw", *SHORT)
    assert (ran.code, ran.err) == (130, "interrupted after 3 tokens\n")
    assert whole.startswith(ran.out.rstrip("\n"))
    assert ran.out.strip()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temperature", "-1"], 2, "--temperature: is out of its range"),
        (["--top-p", "0"], 2, "--top-p: is out of its range"),
        (["--max-new-tokens", "0"], 2, "--max-new-tokens: is out of its range"),
        (["--dtype", "float8"], 2, "--dtype: unknown dtype"),
        (["--device", "tpu"], 2, "--device: unknown device"),
        (["--raw", "--system", "x"], 2, "--system: there is no chat"),
    ],
)
def test_wrong_options_are_refused(arguments, code, message):
    ran = regraft("generate", "demo:tiny", "hello", *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith(f"error: {message}")


def test_code_of_a_checkpoint_runs_only_when_trusted(tmp_path):
    from regraft.core.demo import TINY

    folder = shutil.copytree(Path(TINY), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    code = "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    (folder / "modeling_own.py").write_text(code)
    refused = regraft("generate", folder, "hello", *SHORT)
    assert refused.code == 1
    assert "give --trust-remote-code" in refused.err
    trusted = done("generate", folder, "hello", *SHORT, "--trust-remote-code")
    assert trusted.out == done("generate", "demo:tiny", "hello", *SHORT).out
