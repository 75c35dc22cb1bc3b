"""Metrics of demo:tiny against plain computations with the same model."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from regraft.core.demo.measure import bits_per_byte
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.evaluate.choices import Choices
from regraft.core.evaluate.divergence import Divergence
from regraft.core.evaluate.metric import Measuring
from regraft.core.evaluate.passkey import Passkey
from regraft.core.evaluate.perplexity import Perplexity
from regraft.core.evaluate.preference import Preference
from regraft.core.evaluate.texts import TextParams
from regraft.core.evaluate.variety import Variety
from regraft.core.loaded import Loaded, opened
from tests.families import save_tiny

RUTH = (
    "Now it came to pass in the days when the judges ruled, that there was a famine in the land. And a certain man of "
    "Bethlehemjudah went to sojourn in the country of Moab, he, and his wife, and his two sons.\n"
)
MEASURING = Measuring(batch_size=3)


@cache
def demo():
    return opened("demo:tiny", dtype="float32", device="cpu").load()


@cache
def shaken():
    """demo:tiny with other last layers."""
    loaded = opened("demo:tiny", dtype="float32", device="cpu").load()
    noise = torch.Generator().manual_seed(0)
    for weight in loaded.model.model.layers[-1].parameters():
        weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=noise))
    return loaded


def text_file(folder, text=RUTH * 8, name="text.txt"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_bits_per_byte_are_those_of_another_implementation(tmp_path):
    path = text_file(tmp_path)
    found = Perplexity().measure(demo(), TextParams(data=(path,), window=101, block=50), MEASURING)
    model = demo().model
    model.config.max_position_embeddings = 100  # what the other takes for its windows, a begin token before each
    try:
        bits, rate = bits_per_byte(model, demo().tokenizer._tokenizer, [RUTH * 8])
    finally:
        model.config.max_position_embeddings = 256
    assert found.samples["bpb"].value == pytest.approx(bits, rel=1e-5)
    assert found.facts["tokens"] == pytest.approx(rate * len(RUTH * 8))
    assert found.facts["bytes"] == len(RUTH * 8)
    per_token = bits * math.log(2) * len(RUTH * 8) / found.facts["tokens"]
    assert found.samples["perplexity"].value == pytest.approx(math.exp(per_token), rel=1e-5)
    assert len(found.samples["bpb"].keys) == math.ceil(len(RUTH * 8) / 50)
    closer = Perplexity().measure(demo(), TextParams(data=(path,), window=101, stride=20), MEASURING)
    assert closer.samples["bpb"].value < found.samples["bpb"].value


def test_blocks_pair_whatever_the_tokenizer(tmp_path):
    other = opened(str(save_tiny("llama", tmp_path / "m", tokenizer=True)), dtype="float32", device="cpu").load()
    params = TextParams(data=(text_file(tmp_path, RUTH),), block=40, window=64)
    one, two = (Perplexity().measure(loaded, params, MEASURING) for loaded in (demo(), other))
    assert one.facts["tokens"] != two.facts["tokens"]
    assert one.samples["bpb"].keys == two.samples["bpb"].keys
    assert sum(one.samples["bpb"].weights) == sum(two.samples["bpb"].weights) == len(RUTH)


def test_divergence_is_the_textbook_sum(tmp_path):
    params = TextParams(data=(text_file(tmp_path, RUTH),), block=60)
    found = Divergence().contrast(shaken(), demo(), params, MEASURING)
    ids = torch.tensor([[0, *demo().tokenizer(RUTH, add_special_tokens=False)["input_ids"]]])
    ours, theirs = (one.model(ids).logits[0, :-1].log_softmax(-1) for one in (shaken(), demo()))
    kl = F.kl_div(ours, theirs, log_target=True, reduction="batchmean").item()
    agree = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    assert found.samples["kl"].value == pytest.approx(kl, rel=1e-4)
    assert found.samples["top1_agreement"].value == pytest.approx(agree)
    assert 0 < agree < 1
    same = Divergence().contrast(demo(), demo(), params, MEASURING)
    assert (same.samples["kl"].value, same.samples["top1_agreement"].value) == (0, 1)
    other = Loaded(**{**vars_of(demo()), "model": wider(demo().model)})
    with pytest.raises(Unsupported, match="different tokens"):
        Divergence().contrast(other, demo(), params, MEASURING)


def vars_of(loaded):
    return {name: getattr(loaded, name) for name in ("checkpoint", "model", "tokenizer", "device", "dtype")}


def wider(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "vocab_size": 2050, "num_hidden_layers": 1}))


def test_preference_compares_whole_answers(tmp_path):
    rows = [
        {"prompt": "And the LORD", "chosen": " said unto Moses", "rejected": " elephant of and"},
        {"prompt": "In the land of", "chosen": " said", "rejected": " Egypt, and of Moab"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = Preference().measure(demo(), Preference.Params(data=(str(path),)), MEASURING).samples

    def log_prob(prompt, answer):
        tokenizer = demo().tokenizer
        known, ids = tokenizer(prompt)["input_ids"], [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        log_p = demo().model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(log_p[place - 1, ids[place]].item() for place in range(len(known), len(ids)))

    margins = [log_prob(row["prompt"], row["chosen"]) - log_prob(row["prompt"], row["rejected"]) for row in rows]
    assert found["margin"].totals == pytest.approx(margins, rel=1e-4)
    assert found["accuracy"].value == sum(margin > 0 for margin in margins) / 2


def test_choices_are_scored_and_counted(tmp_path):
    rows = [{"prompt": "In the land of", "options": [" Egypt", " said"], "answer": number} for number in (0, 1)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = Choices().measure(demo(), Choices.Params(data=path), MEASURING)
    assert found.samples["accuracy"].totals == [1.0, 0.0]
    likely, unlikely = found.samples["log_prob"].totals
    assert math.exp(likely) + math.exp(unlikely) == pytest.approx(1)
    assert found.facts == {"questions": 2, "chance": 0.5}


def test_a_citation_is_found_and_an_invention_is_not(tmp_path):
    data = text_file(tmp_path)
    params = Variety.Params(data=(data,), unit="line", new_tokens=12, prompt_tokens=8, max_texts=2, ngram=10)
    plain = Variety().measure(demo(), params, MEASURING)
    assert set(plain.samples) == {"type_token_ratio", "entropy"}
    assert 0 < plain.samples["entropy"].value < math.log(2048)
    first = demo().tokenizer(RUTH)["input_ids"][:8]
    written = demo().model.generate(torch.tensor([first]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    continuation = written[0, 8:].tolist()
    assert plain.samples["type_token_ratio"].totals == pytest.approx([len(set(continuation)) / 12] * 2)
    cited = text_file(tmp_path, demo().tokenizer.decode(continuation), "cited.txt")
    found = Variety().measure(demo(), params.model_copy(update={"corpus": (cited,)}), MEASURING).samples
    assert found["citation_rate"].value == 1
    assert found["longest_citation"].value >= 10
    none = text_file(tmp_path, "xyzzy " * 20, "none.txt")
    assert (
        Variety()
        .measure(demo(), params.model_copy(update={"corpus": (none,)}), MEASURING)
        .samples["citation_rate"]
        .value
        == 0
    )
    with pytest.raises(InputError, match="no text is long enough"):
        Variety().measure(demo(), params.model_copy(update={"prompt_tokens": 500}), MEASURING)


def test_a_key_within_the_window_is_told_and_beyond_it_is_not():
    names = ("Aaron", "Absalom", "Dan", "David", "Eli", "Isaac", "Jacob", "Joab", "Jonathan", "Joseph", "Joshua")
    params = Passkey.Params(
        needle="They called Zadok {key}.", question="They called Zadok", answers=names, lengths=(120, 1000),
        depths=(0.2, 0.8), samples=3,
    )  # fmt: skip
    found = Passkey().measure(demo(), params, MEASURING)
    by_length = found.curves["likeliest by length"].ys
    assert by_length[0] >= 0.8 > by_length[1]
    assert found.samples == Passkey().measure(demo(), params, MEASURING).samples
    assert found.samples != Passkey().measure(demo(), params, replace(MEASURING, seed=1)).samples
    assert len(found.samples["told"].keys) == 12


def test_a_model_with_a_table_of_positions_is_not_read_beyond_it(tmp_path):
    gpt2 = opened(str(save_tiny("gpt2", tmp_path / "m", tokenizer=True)), dtype="float32", device="cpu").load()
    path = text_file(tmp_path)
    with pytest.raises(Unsupported, match="no positions beyond its window"):
        Perplexity().measure(gpt2, TextParams(data=(path,), window=200), MEASURING)
    with pytest.raises(UsageError, match="no such file"):
        Perplexity().check(TextParams(data=("missing.txt",)))
