"""What fuzzing has found: each of these once ended in an exception of Python, in a panic, or not at all."""

import json
from collections.abc import Sequence

import pytest

from regraft.core.verify.folder import VerifyReport
from tests.fuzz.contract import REFUSALS
from tests.fuzz.mutations import HUGE
from tests.fuzz.targets import TARGETS

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {**YARN, "rope_type": "llama3", "original_max_position_embeddings": 64, "low_freq_factor": 1,
          "high_freq_factor": 1}  # fmt: skip


def changed(name: str, seed: int, keys: Sequence[str | int], value: object) -> bytes:
    """An honest file with one value of its JSON replaced."""
    document = json.loads(TARGETS[name].seeds()[seed])
    container = document
    for key in keys[:-1]:
        container = container[key]
    container[keys[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("name", "seed", "keys", "value", "words"),
    [
        ("quant-state", 0, ["quant_type"], [], "quant_type"),
        ("quant-state", 0, ["blocksize"], {}, "blocksize"),
        ("quant-state", 0, ["nested_offset"], HUGE, "nested_offset"),
        ("adapter-config", 0, ["lora_alpha"], HUGE, "lora_alpha"),
        ("adapter-config", 0, ["r"], HUGE, "config.json: r"),
        ("adapter-config", 0, ["rank_pattern"], {"q_proj": HUGE}, "rank_pattern: q_proj"),
        ("adapter-config", 0, ["alpha_pattern"], {"up_proj": HUGE}, "alpha_pattern: up_proj"),
        ("adapter-config", 0, ["alpha_pattern"], {"(.*)*x": 1}, "could take for ever"),
        ("adapter-config", 0, ["alpha_pattern"], {".*.*.*.*.*x": 1}, "could take for ever"),
        ("tokenizer", 0, ["model", "merges"], 5, "model.merges"),
        ("tokenizer", 0, ["model", "merges"], None, "model.merges"),
        ("tokenizer", 0, ["model", "merges"], [5], "model.merges"),
        ("tokenizer", 0, ["model", "merges"], [["a", ""]], "does not read"),
        ("tokenizer", 0, ["model", "vocab", "a"], 2**64, "model.vocab"),
        ("tokenizer", 0, ["added_tokens"], 5, "added_tokens"),
        ("tokenizer", 0, ["added_tokens", 0, "content"], [], "no content"),
        ("tokenizer", 0, ["added_tokens", 0, "id"], HUGE, "added_tokens"),
        ("tokenizer", 1, ["model", "vocab"], [[]], "model.vocab"),
        ("tokenizer", 1, ["model", "vocab"], [5], "model.vocab"),
        ("tokenizer", 1, ["model", "vocab"], [None], "model.vocab"),
        ("tokenizer", 1, ["model", "vocab"], {"a": 0}, "model.vocab"),
        ("tokenizer", 1, ["model", "vocab", 0, 1], "a", "model.vocab"),
        ("tokenizer", 1, ["model", "unk_id"], [], "model.unk_id"),
        ("tokenizer-config", 0, ["added_tokens_decoder"], {"a": {}}, "added_tokens_decoder"),
        ("heads", 0, ["scores", 0, 0], HUGE, "scores"),
        ("training-state", 0, ["optimizer"], None, "damaged"),
        ("training-state", 0, ["losses", 0], HUGE, "damaged"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(
    name: str, seed: int, keys: Sequence[str | int], value: object, words: str
) -> None:
    with pytest.raises(REFUSALS) as caught:
        TARGETS[name].read(changed(name, seed, keys, value))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["head_dim"], 1e308),
        (["head_dim"], {"a": 0}),
        (["head_dim"], 2**62),
        (["num_hidden_layers"], 2**62),
        (["vocab_size"], HUGE),
        (["rope_parameters"], YARN),
        (["rope_parameters"], {**YARN, "original_max_position_embeddings": "a"}),
        (["rope_parameters"], {**YARN, "original_max_position_embeddings": 64, "beta_fast": []}),
        (["rope_parameters"], LLAMA3),
        (["rope_parameters", "rope_theta"], 1e308),
        (["rope_parameters", "rope_theta"], 1),
    ],
)
@pytest.mark.timeout(20)
def test_a_hostile_config_is_neither_planned_on_for_ever_nor_a_plugins_fault(
    keys: Sequence[str | int], value: object
) -> None:
    TARGETS["config"].survives(changed("config", 0, keys, value))


def test_a_dictionary_that_is_no_text_is_refused() -> None:
    with pytest.raises(REFUSALS, match="UTF-8"):
        TARGETS["word-vectors"].read(b"a b\n\xff\xfe c\n")


def test_a_column_whose_name_is_no_text_is_refused() -> None:
    data = TARGETS["parquet"].seeds()[0]
    with pytest.raises(REFUSALS, match="Parquet"):
        TARGETS["parquet"].read(data.replace(b"text", b"\xff\xfe\xff\xfe"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("choices", rb'{"prompt": "a", "options": ["b", "\ud800"], "answer": 0}'),
        ("json-lines", rb'{"text": "one"}' + b"\n" + rb'{"text": "\ud800"}' + b"\n" + rb'{"text": "\udfff two"}'),
        ("json-rows", rb'[{"text": "\ud800"}]'),
    ],
)
def test_half_a_character_in_data_is_refused(name: str, data: bytes) -> None:
    with pytest.raises(REFUSALS, match="surrogate"):
        TARGETS[name].read(data)


@pytest.mark.parametrize(
    "data", [b"perplexity:" + b"9" * 5000, b"choices:a\0.jsonl", b"perplexity:~nobody-there/a.txt"]
)
def test_a_task_with_an_impossible_path_is_refused(data: bytes) -> None:
    with pytest.raises(REFUSALS):
        TARGETS["task"].read(data)


def test_a_file_that_a_lock_file_states_by_an_impossible_name_is_missing() -> None:
    lock = json.loads(TARGETS["lock"].seeds()[0])
    lock["output"]["files"]["9" * 5000] = {"bytes": 0, "sha256": "0"}
    report = TARGETS["lock"].read(json.dumps(lock).encode())
    assert isinstance(report, VerifyReport)
    assert any(finding.message == "a file is missing" for finding in report.faults)


def test_a_saved_patch_that_contradicts_itself_is_no_plugins_fault() -> None:
    patch = json.loads(TARGETS["patch"].seeds()[0])
    edit = next(edit for edit in patch["edits"].values() if edit["operation"] == "scale-rows")
    edit["shape"][0] += 1
    with pytest.raises(REFUSALS, match="contradicts itself"):
        TARGETS["patch"].read(json.dumps(patch).encode())
    edit["shape"][0] -= 1
    edit["parameters"] = dict.fromkeys(edit["parameters"], HUGE)
    with pytest.raises(REFUSALS, match="malformed"):
        TARGETS["patch"].read(json.dumps(patch).encode())
