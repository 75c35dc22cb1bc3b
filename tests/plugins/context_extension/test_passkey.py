"""Passkey prompts have the length, depth and keys asked for; answers are what plain forward passes say."""

from pathlib import Path
from random import Random
from typing import Any

import pytest

from regraft.core.demo import TINY
from regraft.core.errors import InputError, Unsupported
from regraft.core.measures.passkey import Answer, Passkeys, Prompt, ask
from regraft.core.measures.prose import fill, passage, sentences
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.plugins.context_extension.settings import ProbeSettings
from regraft.plugins.context_extension.sweep import Sweep, sweep, sweep_figures, sweep_reports
from tests.families import tiny

NAMES = ("Aaron", "Absalom", "Dan", "David", "Eli", "Isaac", "Jacob", "Joab", "Jonathan", "Joseph", "Joshua", "Judah",
         "Moses", "Samuel", "Saul", "Solomon", "Gideon")  # fmt: skip
RECALL: dict[str, Any] = {"needle": "They called Zadok {key}.", "question": "They called Zadok", "answers": NAMES}


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    """Model and tokenizer of demo:tiny."""
    checkpoint, run = open_folder(TINY, label="demo:tiny"), Run("step")
    return run.model(checkpoint), run.tokenizer(checkpoint)


def passkeys(tokenizer: Any, **settings: Any) -> Passkeys:
    return Passkeys(tokenizer, ProbeSettings(**settings), 7, "probe.")


@pytest.mark.parametrize("settings", [{}, RECALL], ids=["numbers", "names"])
@pytest.mark.parametrize("length", [100, 256, 1000])
def test_a_prompt_fills_its_length_and_has_the_key_at_its_depth(length: int, settings: Any, demo: Any) -> None:
    tokenizer = demo[1]
    for depth in (0.0, 0.3, 0.5, 1.0):
        prompt = passkeys(tokenizer, **settings).prompt(length, depth, 0)
        text = tokenizer.decode(prompt.ids, skip_special_tokens=True)
        question = settings.get("question", ProbeSettings().question)
        assert length - 40 < len(prompt.ids) + len(prompt.keys[0]) <= length
        assert prompt.ids[0] == tokenizer.bos_token_id
        assert text.endswith(question)
        lines = text.splitlines()
        (place,) = [number for number, line in enumerate(lines) if prompt.key in line]
        assert place == round(depth * (len(lines) - 2))
        assert len(prompt.keys) == 10
        assert {len(key) for key in prompt.keys} == {len(prompt.keys[0])}
        assert len({tuple(key) for key in prompt.keys}) == 10
        assert tokenizer.decode(prompt.keys[0]) == f" {prompt.key}"


def test_depth_moves_the_key_and_nothing_else(demo: Any) -> None:
    """The filler of a length and a sample is the same, so that cells differ in depth alone."""
    prompts = passkeys(demo[1], **RECALL)

    def filler(depth: float, number: int = 0) -> list[str]:
        text = demo[1].decode(prompts.prompt(300, depth, number).ids, skip_special_tokens=True)
        return [line for line in text.splitlines() if "Zadok" not in line]

    shortest = min(len(filler(0)), len(filler(1)))
    assert filler(0)[:shortest] == filler(1)[:shortest]
    assert filler(0) != filler(0, number=1)
    assert prompts.prompt(300, 0.5, 1) == passkeys(demo[1], **RECALL).prompt(300, 0.5, 1)


def test_text_of_the_users_own(tmp_path: Path, demo: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One is here. Two is there!\nThree\n\n")
    assert {next(sentences(Random(seed), path)) for seed in range(20)} == {"One is here.", "Two is there!", "Three"}
    lines = sentences(Random(0), path)
    found = [next(lines) for _ in range(6)]
    assert found[:3] == found[3:]
    prompt = passkeys(demo[1], **RECALL, text=path).prompt(100, 0.5, 0)
    assert "Two is there!" in demo[1].decode(prompt.ids)
    for content in (b"", b"\xff\xfe\xff"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"has no text|cannot be read"):
            next(sentences(Random(0), path))


def test_passages_are_exactly_as_long_as_asked(demo: Any) -> None:
    for length in (1, 17, 1000):
        assert len(passage(demo[1], sentences(Random(0)), length)) == length
    with pytest.raises(InputError, match="no tokens"):
        fill(iter(lambda: "", None), lambda taken: 3, 100)


def test_no_room_for_the_needle(demo: Any) -> None:
    with pytest.raises(InputError, match="no room") as raised:
        passkeys(demo[1]).prompt(20, 0.5, 0)
    assert raised.value.where == "probe.lengths"


def test_too_few_keys_of_one_length(demo: Any) -> None:
    few = {**RECALL, "answers": ("Eli", "Nebuchadnezzar", "Methuselah of old"), "choices": 3}
    with pytest.raises(InputError, match="too few keys"):
        passkeys(demo[1], **few).prompt(100, 0.5, 0)


def test_keys_that_the_tokenizer_does_not_keep_apart(demo: Any) -> None:
    """Half a word at the end of the question merges with nothing before a space; an empty answer has no tokens."""

    class Merging:
        eos_token_id = None

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    with pytest.raises(Unsupported, match="keep question and key apart"):
        passkeys(Merging()).prompt(100, 0.5, 0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_an_answer_is_what_whole_forward_passes_say(family: str) -> None:
    """Each key scored without a cache, behind a text longer than the sliding windows."""
    import torch

    overrides = {"sliding_window": 16} if family != "llama" else {}
    model = tiny(family, **overrides)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (50,), generator=generator).tolist()
    for size in (1, 2, 4):
        keys = torch.randint(3, 128, (6, size), generator=generator).tolist()
        scores = []
        for key in keys:
            logits = model(torch.tensor([ids + key])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            scores.append(float(logits.gather(1, torch.tensor(key)[:, None]).sum()))
        greedy = list(ids)
        for _ in range(size):
            greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
        for first in range(6):
            order = [first, *(number for number in range(6) if number != first)]
            prompt = Prompt(ids, [keys[number] for number in order], "k")
            answer = ask(model, Words(), prompt)
            assert answer.rank == 1 + sum(score > scores[first] for score in scores)
            assert answer.told is False
        told = Prompt(ids, [greedy[50:], *keys], Words().decode(greedy[50:]))
        assert ask(model, Words(), told).told


class Words:
    """A tokenizer that only writes numbers."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(map(str, ids))


def test_equal_scores_are_no_knowledge() -> None:
    model = tiny("llama")
    model.lm_head.weight.zero_()
    assert ask(model, Words(), Prompt([5, 6, 7], [[3], [4], [5]], "k")) == Answer(3, False)


def test_the_demo_recalls_inside_its_window_and_not_beyond(demo: Any) -> None:
    settings = passkeys(demo[1], **RECALL, samples=2, depths=(0.25, 0.75))
    heard: list[str] = []
    found = sweep(demo[0], settings, (64, 128, 1024), heard.append)
    figures = sweep_figures({"before": found}, 256)["before"]
    assert figures["inside"]["likeliest"] == 1.0
    assert figures["inside"]["told"] >= 0.75
    assert figures["beyond"]["likeliest"] <= 0.5
    assert heard[0] == "passkey: 4 texts of 64 tokens"


def test_reports_of_a_sweep() -> None:
    yes, no = Answer(1, True), Answer(4, False)
    found = Sweep((16, 32), (0.0, 1.0), (((yes, yes), (yes, no)), ((no, no), (no, yes))))
    reports = {name: file.read() for name, file in sweep_reports({"after": found}, ProbeSettings()).items()}
    assert reports["passkey.csv"].decode().splitlines() == [
        "model,length,depth,rank,told", "after,16,0,1,1", "after,16,0,1,1", "after,16,1,1,1", "after,16,1,4,0",
        "after,32,0,4,0", "after,32,0,4,0", "after,32,1,4,0", "after,32,1,1,1",
    ]  # fmt: skip
    assert reports["passkey-after.png"].startswith(b"\x89PNG")
    assert sweep_figures({"after": found}, 16) == {
        "after": {
            "inside": {"likeliest": 0.75, "told": 0.75, "mean_rank": 1.75},
            "beyond": {"likeliest": 0.25, "told": 0.25, "mean_rank": 3.25},
        }
    }
    assert sweep_figures({"after": found}, 32)["after"]["beyond"] is None
