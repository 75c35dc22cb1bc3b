"""How new rows are made: each method against its closed form or the plainest code."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from regraft.core.errors import InputError, UsageError
from regraft.core.sources.open import open_checkpoint
from regraft.plugins.tokenizer_retrofit.focus import auxiliary_space, mixtures, sparsemax
from regraft.plugins.tokenizer_retrofit.omp import pursue
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import Origin
from regraft.plugins.tokenizer_retrofit.wechsel import aligned, neighbours, read_vectors
from tests.plugins.tokenizer_retrofit import toys


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    scores = torch.randn(40, 9, dtype=torch.float64) * 1.5
    found = sparsemax(scores)
    torch.testing.assert_close(found.sum(1), torch.ones(40, dtype=torch.float64))
    tau = ((scores - found) * (found > 0)).sum(1) / (found > 0).sum(1)
    # The conditions of Karush, Kuhn and Tucker: one tau for the support, and no score outside it is above.
    support, outside = found > 0, found == 0
    torch.testing.assert_close(torch.where(support, scores - found, tau[:, None]), tau[:, None].expand_as(scores))
    assert bool(((scores <= tau[:, None] + 1e-12) | ~outside).all())
    assert sparsemax(torch.tensor([0.1, 3.0, 1.5])).tolist() == [0, 1, 0]


def test_a_token_in_the_company_of_another_gets_its_row():
    space = torch.eye(4)[[0, 1, 2, 1, 3]]
    origins = [Origin(kept=7), Origin(kept=5), Origin(kept=9), Origin(parts=(1,)), Origin(parts=(2,))]
    assert mixtures(space, origins)[3] == ([5], [1.0])
    assert sum(mixtures(space, origins)[4][1]) == pytest.approx(1)


def test_tokens_that_are_used_alike_are_near_in_the_auxiliary_space():
    generator = np.random.default_rng(0)
    texts = []
    for _ in range(400):
        noun, context = generator.integers(2), generator.integers(4, 8)
        texts.append([int(context), int(noun), int(context)])
        texts.append([int(generator.integers(8, 12)), int(generator.integers(2, 4)), int(generator.integers(8, 12))])
    space = auxiliary_space(texts, 14, seed=1, dimensions=4)
    assert torch.equal(space, auxiliary_space(texts, 14, seed=1, dimensions=4))
    similar, different = space[0] @ space[1], space[0] @ space[2]
    assert similar > 0.9 > 0.5 > different
    assert not space[12:].any()


def plain_pursuit(atoms, target, k):
    """Each round: the atom most in the direction of the residual, then a least-squares fit by all chosen."""
    chosen, left = [], target
    for _ in range(k):
        scores = (atoms @ left).abs() / atoms.norm(dim=1)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        fit = torch.linalg.lstsq(atoms[chosen].T, target[:, None]).solution[:, 0]
        left = target - atoms[chosen].T @ fit
    return chosen, fit, left


def test_matching_pursuit_is_the_plain_loop_with_least_squares():
    torch.manual_seed(0)
    atoms = torch.randn(60, 16, dtype=torch.float64) * torch.rand(60, 1, dtype=torch.float64) * 3
    targets = torch.randn(9, 16, dtype=torch.float64)
    chosen, weights = pursue(atoms, targets, 6, batch=4)
    residuals = []
    for target, places, coefficients in zip(targets, chosen, weights, strict=True):
        wanted, fit, left = plain_pursuit(atoms, target, 6)
        assert places.tolist() == wanted
        torch.testing.assert_close(coefficients, fit)
        residuals.append(left.norm())
    shorter, fewer = pursue(atoms, targets, 3)
    errors = (targets - (atoms[shorter] * fewer[..., None]).sum(1)).norm(dim=1)
    assert bool((errors >= torch.stack(residuals)).all())


def test_a_target_that_is_an_atom_takes_it_alone_and_too_many_atoms_are_refused():
    atoms = torch.randn(5, 8)
    chosen, weights = pursue(atoms, 2 * atoms[3:4], 4)
    assert chosen[0, 0] == 3
    torch.testing.assert_close(weights[0], torch.tensor([2.0, 0, 0, 0], dtype=torch.float64))
    with pytest.raises(UsageError, match="fewer shared tokens"):
        pursue(atoms, atoms, 6)


def test_a_rotated_donor_gives_back_our_rows(tmp_path):
    """With a donor whose rows are ours turned, the error of the rows is that of the fit in the donor's space."""
    from safetensors.torch import load_file, save_file

    base = toys.save("llama", tmp_path / "base")
    donor = toys.save("llama", tmp_path / "donor", "byte-bpe-dutch")
    turn = torch.linalg.qr(torch.randn(64, 64)).Q
    name = "model.embed_tokens.weight"
    ours, theirs = load_file(base / "model.safetensors"), load_file(donor / "model.safetensors")
    own_ids, donor_ids = (TokenizerFile.of(open_checkpoint(folder)).ids for folder in (base, donor))
    for token, index in donor_ids.items():
        if token in own_ids:
            theirs[name][index] = ours[name][own_ids[token]] @ turn
    save_file(theirs, donor / "model.safetensors", {"format": "pt"})
    options = {"vocabulary": "replace-donor", "donor": donor, "init": "omp", "size": None, "min_count": None}
    _, after, patch = toys.retrofit(base, None, **options, atoms=64)
    assert patch.metrics["composed"] > 10
    found, ids = after.load(name), TokenizerFile.of(after).ids
    # As many atoms as dimensions span the space, so each row is met, and turning changes no length.
    for token, index in ids.items():
        torch.testing.assert_close(found[index] @ turn, theirs[name][donor_ids[token]], atol=1e-3, rtol=0)


def test_at_zero_temperature_the_nearest_word_is_taken():
    old = {4: [1.0, 0.0], 6: [0.0, 1.0], 8: [0.7, 0.7]}
    found = neighbours({20: [0.1, 0.9]}, old, k=3, temperature=1e-4)
    assert found[20][0][0] == 6
    assert found[20][1] == pytest.approx([1, 0, 0])
    warm = neighbours({20: [0.1, 0.9]}, old)
    cosines = [
        torch.cosine_similarity(torch.tensor([0.1, 0.9]), torch.tensor(old[index]), dim=0) for index in warm[20][0]
    ]
    wanted = (torch.stack(cosines) / 0.1).softmax(0)
    torch.testing.assert_close(torch.tensor(warm[20][1]), wanted)


def test_a_rotation_is_found_from_pairs_of_words():
    source, turn = torch.randn(30, 5), torch.linalg.qr(torch.randn(5, 5)).Q
    torch.testing.assert_close(aligned(source, source @ turn), turn, atol=1e-5, rtol=0)


def test_files_that_hold_no_vectors_are_refused(tmp_path):
    path = tmp_path / "x.vec"
    for text, message in [("word 1 2\n", "no file of word vectors"), ("1 3\na 1 2\n", "another number"),
                          ("1 2\na 1 x\n", "no number")]:  # fmt: skip
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_vectors(path, ["a"])


@pytest.mark.parametrize("init", ["blend", "focus", "wechsel", "mean", "normal"])
def test_every_method_keeps_old_rows_and_makes_finite_new_ones(tmp_path, init):
    corpus = tmp_path / "nl.txt"
    corpus.write_text(toys.DUTCH)
    vectors = None
    if init == "wechsel":
        words = sorted({word for text in (toys.DUTCH, toys.ENGLISH) for word in text.split()})
        lines = [f"{word} {' '.join(str(0.1 + ord(letter) % 7) for letter in (word * 3)[:3])}" for word in words]
        (tmp_path / "w.vec").write_text("\n".join([f"{len(words)} 3", *lines]))
        vectors = {"source": tmp_path / "w.vec", "target": tmp_path / "w.vec"}
    folder = toys.save("llama", tmp_path / "base", tie_word_embeddings=False)
    before, after, patch = toys.retrofit(folder, corpus, init=init, vectors=vectors)
    rows = before.config["vocab_size"]
    assert {*patch.edits} == {"model.embed_tokens.weight", "lm_head.weight"}
    for name in patch.edits:
        old, new = before.load(name), after.load(name)
        assert torch.equal(old, new[:rows])
        assert bool(torch.isfinite(new).all())
        means = torch.stack([old[parts].mean(0) for parts in patch_parts(patch)])
        assert not torch.allclose(new[rows:], means, atol=1e-3)
    if init == "mean":
        torch.testing.assert_close(new[rows:], old.mean(0).expand(len(new) - rows, -1))


def patch_parts(patch):
    import json

    return json.loads(patch.reports["id_map.json"].read())["composed_of"].values()


def test_methods_name_what_they_need(tmp_path):
    for values, message in [({"init": "wechsel"}, "vectors go together"), ({"init": "omp"}, "replace-donor")]:
        with pytest.raises(ValidationError, match=message):
            toys.params(tmp_path / "x.txt", **values)
