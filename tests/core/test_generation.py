"""Text as transformers' own generation writes it, in pieces of whole characters."""

from functools import cache

import pytest
import torch

from regraft.core.errors import InputError, UsageError
from regraft.core.generation import Generation, Prompt, Sampling, _Speller, choose, read_prompt
from regraft.core.loaded import opened


@cache
def demo():
    return opened("demo:tiny", dtype="float32", device="cpu").load()


@pytest.mark.parametrize("raw", [True, False])
def test_the_likeliest_text_is_that_of_transformers(raw):
    loaded = demo()
    prompt = read_prompt(loaded.tokenizer, "Repeat: Moses and the rivers of Egypt", raw=raw)
    written = Generation(loaded.model, loaded.tokenizer, prompt, Sampling(40))
    pieces = list(written)
    theirs = loaded.model.generate(torch.tensor([prompt.ids]), max_new_tokens=40, do_sample=False)[0, len(prompt.ids) :]
    ends = [number for number, token in enumerate(theirs.tolist()) if token == loaded.tokenizer.eos_token_id]
    assert written.ids == theirs.tolist()[: ends[0] if ends else None]
    assert written.text == "".join(pieces) == loaded.tokenizer.decode(written.ids, skip_special_tokens=True)
    assert len(pieces) > 5
    assert written.stopped == ("end" if ends else "length")
    assert torch.is_grad_enabled()


def test_the_chat_template_writes_the_prompt_unless_it_is_raw():
    tokenizer = demo().tokenizer
    chat = read_prompt(tokenizer, "Hello", system="Be brief.")
    assert chat.text == "<|begin|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"
    assert chat.ids == tokenizer(chat.text, add_special_tokens=False)["input_ids"]
    assert read_prompt(tokenizer, "Hello", raw=True).text == "Hello"
    with pytest.raises(UsageError, match="no chat"):
        read_prompt(tokenizer, "Hello", raw=True, system="Be brief.")


def test_no_piece_ends_inside_a_character():
    tokenizer = demo().tokenizer
    text = "naïve 😀 日本語, and Moses; " * 12
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    speller = _Speller(tokenizer)
    pieces = [speller.add(token) for token in ids]
    assert "".join([*pieces, speller.rest()]) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # characters of several tokens did occur


def test_a_text_ends_with_the_window():
    loaded = demo()
    prompt = Prompt("", loaded.tokenizer("word " * 400)["input_ids"][:254], chat=False)
    written = Generation(loaded.model, loaded.tokenizer, prompt, Sampling(10))
    list(written)
    assert (len(written.ids), written.stopped) == (2, "window")
    full = Prompt("", [*prompt.ids, 5, 5], chat=False)
    with pytest.raises(UsageError, match="fills the model's window"):
        list(Generation(loaded.model, loaded.tokenizer, full))


def test_draws_follow_temperature_and_top_p():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    draw = torch.Generator().manual_seed(1)
    sampling = Sampling(temperature=2.0, top_p=0.8)
    drawn = torch.tensor([choose(logits, sampling, draw) for _ in range(4000)])
    p = torch.softmax(logits / 2, -1)
    kept = torch.where(p.cumsum(-1) > 0, p, 0)  # 0.43, 0.16, 0.26, 0.10: the first three of the likeliest reach 0.8
    kept[3] = 0
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(shares, kept / kept.sum(), atol=0.03)
    again = torch.Generator().manual_seed(1)
    assert [choose(logits, sampling, again) for _ in range(50)] == drawn[:50].tolist()
    assert {choose(logits, Sampling(temperature=5.0, top_p=1e-9), draw) for _ in range(50)} == {0}
    with pytest.raises(InputError, match="not finite"):
        choose(torch.full((4,), float("nan")), sampling, draw)
