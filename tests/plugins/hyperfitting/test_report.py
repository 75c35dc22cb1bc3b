"""Sequences that are drawn and held out, what is measured on them, and the files that say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft.core.measures.tokens import longest_shared_runs, type_token_ratio
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.hyperfitting.data import read_material
from tests.plugins.hyperfitting.support import params_of, report_bytes, sentences, step

Folder = Callable[..., Path]


def material(folder: Path, path: Path, *, seed: int = 0, **values: Any) -> Any:
    run = Run("hyperfitting", seed=seed)
    return read_material(params_of(path, **values), run.tokenizer(open_checkpoint(str(folder))), 128, run)


def ids(examples: Any) -> list[tuple[int, ...]]:
    return [tuple(one.ids) for one in examples]


def test_sequences_are_drawn_from_the_stream_and_set_aside(tiny_folder: Folder, text: Path) -> None:
    """All of exactly seq_len tokens, pieces of one stream, none in both sets, and every token learnt."""
    found = material(tiny_folder(), text, samples=6, held_out=3)
    assert (len(found.training), len(found.held_out)) == (6, 3)
    both = [*ids(found.training), *ids(found.held_out)]
    assert len(set(both)) == 9
    assert {len(one) for one in both} == {24}
    assert all(one.learnt == 23 for one in found.training)
    tokenizer = Run("x").tokenizer(open_checkpoint(str(tiny_folder())))
    stream = tokenizer(text.read_text())["input_ids"] + [tokenizer.eos_token_id]
    pieces = {tuple(stream[start : start + 24]) for start in range(0, len(stream), 24)}
    assert set(both) < pieces
    assert found.notes == ("2 of 6 sequences are left out of each epoch, others each time: they fill no batch",)
    assert ids(material(tiny_folder(), text, samples=6, held_out=3, seed=1).training) != ids(found.training)


@pytest.mark.parametrize(
    ("values", "training", "held_out"),
    [
        ({"samples": 8, "held_out": 0.25}, 8, 2),
        ({"samples": 2000, "held_out": 0.25}, 14, 5),
        ({"samples": 8, "held_out": 0.001}, 8, 1),
        ({"samples": 8, "held_out": 0}, 8, 0),
        ({"samples": 2000, "held_out": 1}, 18, 1),
    ],
)
def test_what_is_held_out(
    values: dict[str, Any], training: int, held_out: int, tiny_folder: Folder, text: Path
) -> None:
    found = material(tiny_folder(), text, **values)
    assert (len(found.training), len(found.held_out)) == (training, held_out)
    assert any("2000 asked for" in note for note in found.notes) == (values["samples"] == 2000)


def test_held_out_data_of_its_own(tiny_folder: Folder, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(sentences(9, seed=7))
    found = material(tiny_folder(), text, held_out=str(other))
    assert len(found.training) == 8
    assert len(found.held_out) == 14
    assert not set(ids(found.training)) & set(ids(found.held_out))
    assert found.summary["held_out_data"]["files"].keys() == {"other.txt"}
    few = material(tiny_folder(), text, held_out={"source": str(other), "max_rows": 3})
    assert len(few.held_out) == 3
    assert set(ids(few.held_out)) < set(ids(found.held_out))


def test_without_packing_the_beginnings_of_long_texts(tiny_folder: Folder, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    texts = [sentences(1, seed)[: 10 + 5 * seed] for seed in range(12)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = material(tiny_folder(), data, pack=False, samples=20, held_out=1)
    tokenizer = Run("x").tokenizer(open_checkpoint(str(tiny_folder())))
    long = [tuple(tokenizer(text)["input_ids"][:24]) for text in texts if len(text) >= 24]
    assert sorted([*ids(found.training), *ids(found.held_out)]) == sorted(long)
    assert found.summary["data"]["dropped"] == 3


def test_packed_texts_may_be_kept_apart(tiny_folder: Folder, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": sentences(1, seed)}) + "\n" for seed in range(12)))
    _, apart = step(tiny_folder(), data, data={"source": str(data), "restart_positions": True})
    _, stream = step(tiny_folder(), data)
    assert apart.metrics["first_loss"] != stream.metrics["first_loss"]
    assert apart.metrics["data"]["learnt_tokens"] < stream.metrics["data"]["learnt_tokens"]


def test_chats_are_learnt_whole_unless_asked(tiny_folder: Folder, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": sentences(1, seed), "completion": sentences(1, seed + 50)} for seed in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = material(tiny_folder(), data).summary["data"]
    answers = material(tiny_folder(), data, data={"source": str(data), "learn": "answer"}).summary["data"]
    assert whole["learnt_tokens"] == whole["tokens"] - whole["sequences"]
    assert answers["learnt_tokens"] < 0.8 * (answers["tokens"] - answers["sequences"])


def test_the_files_of_a_report(tiny_folder: Folder, text: Path) -> None:
    """The page shows the continuations whose figures the metrics are; the log has the steps and no times."""
    result, patch = step(tiny_folder(), text, epochs=3)
    files = report_bytes(patch)
    assert set(files) == {"loss.png", "losses.jsonl", "samples.md"}
    assert files["loss.png"].startswith(b"\x89PNG")
    lines = [json.loads(line) for line in files["losses.jsonl"].splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == {"step", "loss"} for line in lines)
    page = files["samples.md"].decode()
    tokenizer, model = Run("x").tokenizer(result), Run("x").model(result)
    found = material(tiny_folder(), text, epochs=3)
    from regraft.core.measures.greedy import greedy

    contexts = [list(one.ids[:8]) for one in found.held_out]
    continuations = greedy(model, contexts, 16)
    for row in [*contexts, *continuations]:
        assert f"```text\n{tokenizer.decode(row, clean_up_tokenization_spaces=False)}\n```" in page
    after = patch.metrics["after"]
    ratios = [type_token_ratio(row, 12) for row in continuations]
    runs = longest_shared_runs(continuations, ids(found.training))
    assert after["type_token_ratio"] == pytest.approx(sum(ratios) / 2)
    assert after["longest_shared_run"] == max(runs)
    assert after["citation_rate"] == sum(run >= 4 for run in runs) / 2
    assert f"After (TTR {ratios[1]:.3f}, run {runs[1]}):" in page


def test_prompts_take_the_place_of_beginnings(tiny_folder: Folder, text: Path) -> None:
    report = {"prompts": ["honey", "blue fog and ```"], "ttr_window": 12, "new_tokens": 16}
    _, patch = step(tiny_folder(), text, held_out=0, report=report)
    page = patch.reports["samples.md"].read().decode()
    assert "```text\nhoney\n```" in page
    assert "````text\nblue fog and ```\n````" in page
    assert patch.metrics["after"]["continuations"] == 2
    assert "held_out" not in patch.metrics["after"]
    assert not any("held-out" in note for note in patch.notes)


def test_nothing_to_continue(tiny_folder: Folder, text: Path) -> None:
    for values in ({"held_out": 0}, {"report": {"samples": 0}}):
        _, patch = step(tiny_folder(), text, **values)
        assert set(patch.reports) == {"loss.png", "losses.jsonl"}
        assert "type_token_ratio" not in patch.metrics["after"]
        assert any("no continuations" in note for note in patch.notes)


def test_notes_say_what_gets_worse(tiny_folder: Folder, text: Path) -> None:
    _, patch = step(tiny_folder(), text, samples=100, epochs=12, lr=3e-3)
    assert patch.notes[0] == "the data gives 17 sequences of 24 tokens, of 100 asked for"
    held_out = {name: patch.metrics[name]["held_out"] for name in ("before", "after")}
    assert patch.notes[3].startswith(
        f"held-out perplexity {held_out['before']['perplexity']:.1f} -> {held_out['after']['perplexity']:.1f}, entropy"
    )
    assert "citation rate" in patch.notes[4]
    numbers = json.dumps(patch.metrics)
    assert "seconds" not in numbers
    assert str(text) not in numbers


def test_perplexity_that_does_not_get_worse(tiny_folder: Folder, text: Path) -> None:
    """Of a random model every training makes it better."""
    _, patch = step(tiny_folder(), text, strength=0.9)
    before, after = (patch.metrics[name]["held_out"]["perplexity"] for name in ("before", "after"))
    assert after < before
    assert any("not hyperfitting yet" in note for note in patch.notes)
    assert any(note.endswith("at strength 0.9") for note in patch.notes)
