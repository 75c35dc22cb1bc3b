"""Approximate likelihood matching: chunks of two tokenizers, what they are worth to the old model, and the loss."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core.errors import InputError
from regraft.core.sources.open import open_checkpoint
from regraft.core.training.head import Head
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.alignment import NO_CHUNK, Cutter, align, aligned_texts, cut
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.likelihoods import LikelihoodMatching, matching_loss
from regraft.plugins.tokenizer_retrofit.params import AdaptSettings
from regraft.plugins.tokenizer_retrofit.spaces import label_and_space_log_probs, space_tokens
from regraft.plugins.tokenizer_retrofit.teacher import drawn, taught_steps
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from tests.families import save_tiny
from tests.plugins.tokenizer_retrofit import toys


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "nl.txt"
    path.write_text(toys.DUTCH)
    return path


def cutter(checkpoint):
    return Cutter(Run("x").tokenizer(checkpoint), TokenizerFile.of(checkpoint))


def searched(one, other):
    """Chunks by trying every byte: it ends one where it is the end of a token in both."""
    total = sum(one)
    ends = [{sum(own[: place + 1]) for place in range(len(own))} for own in (one, other)]
    borders = [byte for byte in range(1, total + 1) if byte in ends[0] and byte in ends[1]]
    return [
        [sum(border < sum(own[: place + 1]) for border in borders) for place in range(len(own))] for own in (one, other)
    ]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12).flatmap(lambda size: st.tuples(*[st.lists(st.booleans(), min_size=size, max_size=size)] * 2)))
def test_chunks_end_where_tokens_of_both_end(ends):
    cuts = []
    for own in ends:
        places = [0, *(place + 1 for place, end in enumerate(own[:-1]) if end), len(own)]
        cuts.append([stop - start for start, stop in pairwise(places)])
    first, second = align(*cuts)
    assert [first, second] == searched(*cuts)
    for chunk in range(first[-1] + 1):
        sizes = [
            sum(n for n, own in zip(cut, chunks, strict=True) if own == chunk)
            for cut, chunks in zip(cuts, (first, second), strict=True)
        ]
        assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("donor", ["byte-bpe-dutch", "piece-bpe"])
def test_texts_are_cut_into_chunks_of_the_same_bytes(tmp_path, donor):
    old = cutter(open_checkpoint(toys.save("llama", tmp_path / "old")))
    new = cutter(open_checkpoint(toys.save("llama", tmp_path / "new", donor, rows=500)))
    found = list(aligned_texts(cut([toys.DUTCH], 48), old, new, tokens=48, window=96))
    assert len(found) > 3
    assert None not in found
    covered = []
    for text in found:
        assert len(text.new.example) <= 48
        assert len(text.old.example) <= 96
        whole = []
        for own, side in ((old, text.old), (new, text.new)):
            parts = [b""] * text.count
            for index, chunk in zip(side.example.ids, side.chunks, strict=True):
                if chunk != NO_CHUNK:
                    parts[chunk] += own.file.bytes_of(own.file.tokens[index])
            whole.append(parts)
        longer = max(whole, key=lambda parts: sum(map(len, parts)))
        if sum(map(len, whole[0])) != sum(map(len, whole[1])):
            longer[0] = longer[0].removeprefix(b" ")
        assert whole[0] == whole[1]
        covered += whole[0]
    assert b"".join(covered).replace(b" ", b"") == toys.DUTCH.encode().replace(b" ", b"")


def plain(model, file, side, count, append_space, join_below):
    """Token by token: the chunks joined, and what each is worth."""
    log_probs = model(torch.tensor([list(side.example.ids)])).logits[0].log_softmax(-1)
    ends_a_chunk = [index for index, token in file.tokens.items()
                    if token in ("<pad>", "<s>", "</s>", "<unk>") or token[0] in "ĠĊĉ"]  # fmt: skip
    worth, behind = [0.0] * count, [0.0] * count
    for place, chunk in enumerate(side.chunks):
        if chunk != NO_CHUNK:
            worth[chunk] += log_probs[place - 1, side.example.ids[place]].item()
            behind[chunk] = log_probs[place, ends_a_chunk].exp().sum().log().item()
    groups = [[]]
    for chunk in range(count):
        groups[-1].append(chunk)
        if math.exp(behind[chunk]) > join_below and chunk < count - 1:
            groups.append([])
    return groups, [sum(worth[chunk] for chunk in own) + append_space * behind[own[-1]] for own in groups]


@pytest.mark.parametrize(("append_space", "join_below"), [(False, 0), (True, 0), (True, 0.28), (False, 0.28)])
def test_the_teacher_gives_each_chunk_the_product_of_its_tokens(tmp_path, corpus, append_space, join_below):
    before, after, _ = toys.retrofit(toys.save("llama", tmp_path / "base"), corpus)
    given_ = AdaptSettings(data=toys.params(corpus).corpus, loss="alm", tokens=40, steps=3, precision="float32",
                           append_space=append_space, join_below=join_below)  # fmt: skip
    run = Run("x")
    steps, summary = taught_steps(before, cutter(after), TokenizerFile.of(before), given_, Corpus(given_.data), run)
    assert summary["left_out"] == 0
    assert summary["passages"] == len(steps) == 3
    assert summary["chunks"] == sum(text.count for text in steps.texts)
    model, file = run.model(before), TokenizerFile.of(before)
    several = 0
    for step in range(3):
        (index,) = steps.batches.indices(step)
        text = steps.texts[index]
        assert file.tokens[text.old.example.ids[0]] == "<s>"
        lengths = [
            [len(own.file.bytes_of(own.file.tokens[token])) for token in side.example.ids[1:]]
            for own, side in ((cutter(before), text.old), (cutter(after), text.new))
        ]
        first, second = align(*lengths)
        side = replace(text.old, chunks=[NO_CHUNK, *first])
        groups, wanted = plain(model, file, side, first[-1] + 1, append_space, join_below)
        assert steps.wanted[index].tolist() == pytest.approx(wanted, abs=1e-4)
        number = {chunk: place for place, own in enumerate(groups) for chunk in own}
        assert list(text.old.chunks) == [NO_CHUNK, *(number[chunk] for chunk in first)]
        assert list(text.new.chunks) == [NO_CHUNK, *(number[chunk] for chunk in second)]
        assert steps.units(step) == len(wanted)
        several += sum(len(own) > 1 for own in groups)
    assert (several > 0) == (join_below > 0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("append_space", [True, False])
def test_the_same_model_and_tokenizer_are_the_least_that_the_loss_can_be(tmp_path, corpus, append_space, fused):
    checkpoint = open_checkpoint(toys.save("llama", tmp_path / "base"))
    given_ = AdaptSettings(data=toys.params(corpus).corpus, loss="alm", tokens=40, steps=2, batch_size=3,
                           precision="float32", append_space=append_space, join_below=0.2)  # fmt: skip
    run, file = Run("x"), TokenizerFile.of(checkpoint)
    steps, _ = taught_steps(checkpoint, cutter(checkpoint), file, given_, Corpus(given_.data), run)
    model = run.model(checkpoint)
    loss_of = LikelihoodMatching(Head.of(model, fused=fused), space_tokens(file) if append_space else None)
    table = model.get_input_embeddings().weight.requires_grad_()
    (piece,) = steps.micro(0)
    loss, figures = loss_of(piece)
    shares = [math.exp(one / 100 - 1e-6) for one in piece.wanted.tolist()]
    least = -sum(share * math.log(share) + (1 - share) * math.log(1 - share) for share in shares)
    assert loss.item() == pytest.approx(least, rel=1e-5)
    assert figures["gap"].item() < 1e-3
    (gradient,) = torch.autograd.grad(loss, table)
    with torch.no_grad():
        table += 0.05 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    moved, _ = loss_of(piece)
    (other,) = torch.autograd.grad(moved, table)
    assert moved.item() > loss.item()
    assert gradient.norm() < 1e-3 * other.norm()


def test_a_space_behind_has_the_share_and_the_gradient_of_the_softmax(tmp_path):
    from transformers import AutoModelForCausalLM

    save_tiny("gemma2", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    head = Head.of(model)
    assert head.fused
    assert head.softcap
    ids, spaces = torch.arange(24).view(2, 12), torch.tensor([3, 9, 77])
    ends = torch.tensor([2, 11, 12, 23])
    weight = head.module.weight.requires_grad_()
    tokens, behind = label_and_space_log_probs(head, ids, ends, spaces)
    log_probs = model(ids).logits.log_softmax(-1)
    wanted = log_probs.flatten(0, 1)[ends][:, spaces].logsumexp(1)
    torch.testing.assert_close(behind, wanted)
    torch.testing.assert_close(tokens[:, :-1], log_probs[:, :-1].gather(2, ids[:, 1:, None])[..., 0])
    own, plainly = (torch.autograd.grad(one.sum(), weight, retain_graph=True)[0] for one in (behind, wanted))
    torch.testing.assert_close(own, plainly, atol=1e-5, rtol=1e-4)


def test_tokens_that_begin_with_a_space_or_are_special_end_what_is_before_them():
    for kind, mark in [("byte-bpe", "Ġ"), ("piece-bpe", "\u2581"), ("unigram", "\u2581")]:
        file = TokenizerFile.parse(json.loads(toys.backend(kind).to_str()), kind)
        found = {file.tokens[index] for index in space_tokens(file)}
        assert {token for token in file.tokens.values() if token.startswith(mark)} <= found
        assert set(toys.SPECIALS) <= found
        assert not {"a", "the"} & found
    document = json.loads(toys.backend("byte-bpe").to_str())
    document["added_tokens"] = []
    vocab = [token for token in document["model"]["vocab"] if token.isalpha() and token.isascii()]
    document["model"] |= {"vocab": {token: index for index, token in enumerate(vocab)}, "merges": []}
    with pytest.raises(InputError, match="no token begins with a space"):
        space_tokens(TokenizerFile.parse(document, "x"))


def test_a_sample_of_passages_is_drawn_evenly_and_no_more_is_held():
    counts = Counter(one for seed in range(400) for one in drawn(map(str, range(40)), 5, seed))
    assert sum(counts.values()) == 400 * 10
    assert len(counts) == 40
    assert all(60 < count < 140 for count in counts.values())  # 100 wanted, standard deviation 8.7
    assert drawn(map(str, range(6)), None, 0) == list("012345")
    assert sorted(drawn(map(str, range(6)), 5, 0)) == list("012345")


def test_the_loss_has_the_gradient_of_its_formula_and_is_finite_at_certainty():
    wanted = torch.tensor([-3.0, -0.5, 0.0, -200.0], dtype=torch.float64)
    found = torch.tensor([-4.0, -0.1, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(matching_loss(found, wanted).sum(), found)
    teacher, own = (torch.exp(one / 100 - 1e-6) for one in (wanted, found.detach()))
    torch.testing.assert_close(gradient, (own - teacher) / (1 - own) / 100)
    certain = matching_loss(torch.zeros(1), torch.zeros(1))
    assert certain.isfinite().all()


@pytest.mark.parametrize("vocabulary", ["extend", "replace-train"])
def test_new_rows_learn_what_the_old_model_said(tmp_path, corpus, vocabulary):
    folder = toys.save("llama", tmp_path / "base")
    adapt = {"loss": "alm", "steps": 24, "tokens": 64, "lr": 0.02, "epochs": 8, "warmup_steps": 1, "batch_size": 4,
             "precision": "float32"}  # fmt: skip
    size = {"extend": 40, "replace-train": 340}[vocabulary]
    before, after, patch = toys.retrofit(folder, corpus, adapt=adapt, vocabulary=vocabulary, size=size)
    losses = [json.loads(line)["loss"] for line in patch.reports["losses.jsonl"].read().splitlines()]
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])
    assert patch.metrics["adapt"]["data"]["left_out"] == 0
    name = "model.embed_tokens.weight"
    found = json.loads(patch.reports["id_map.json"].read())
    for old, new in enumerate(found["old_to_new"]):
        if new is not None:
            assert torch.equal(before.load(name)[old], after.load(name)[new])
    means = torch.stack([before.load(name)[parts].mean(0) for parts in found["composed_of"].values()])
    assert not torch.allclose(after.load(name)[[int(index) for index in found["composed_of"]]], means, atol=1e-3)


def test_texts_that_the_vocabularies_spell_otherwise_are_left_out(tmp_path):
    folder = toys.save("llama", tmp_path / "base")
    document = json.loads((folder / "tokenizer.json").read_text())
    other = toys.save("llama", tmp_path / "lower")
    (other / "tokenizer.json").write_text(json.dumps({**document, "normalizer": {"type": "Lowercase"}}))
    text = tmp_path / "text.txt"
    text.write_text("ALL IN CAPITALS")
    before, lower = open_checkpoint(folder), open_checkpoint(other)
    given_ = AdaptSettings(data=toys.params(text).corpus, loss="alm", tokens=40)
    with pytest.raises(InputError, match="no passage with the same bytes"):
        taught_steps(before, cutter(lower), TokenizerFile.of(before), given_, Corpus(given_.data), Run("x"))
