"""What `large-vocabulary` makes: an index and rows, the same every time and in bounded memory, and what it refuses."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load

from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.large import LargeVocabulary as Step
from regraft.plugins.tokenizer_retrofit.large.params import LargeVocabularyParams
from tests.plugins.tokenizer_retrofit import test_hypernet, toys


@pytest.fixture(scope="module")
def base(folder):
    return toys.save("llama", folder / "base", rows=330, tie_word_embeddings=False)


def test_an_index_turned_by_what_is_asked_finds_more_and_leaves_products_alone(tmp_path):
    from regraft.plugins.tokenizer_retrofit.large.index import build_index, likeliest, measure, turning

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3000, 32, generator=generator)
    asked = torch.randn(400, 32, generator=generator) * torch.linspace(0.02, 3, 32) ** 2
    turn, back = turning(asked[:200], 32)
    products = asked[200:] @ rows.T
    assert torch.allclose((asked[200:] @ back) @ (rows @ turn).T, products, atol=1e-3)
    moment = (asked[:200] @ back).T @ (asked[:200] @ back) / 200
    assert torch.linalg.eigvalsh(moment).max() < 1.0

    def vectors():
        yield torch.arange(3000) + 7, rows

    found = {}
    wanted = likeliest(vectors, asked[200:])
    assert torch.equal(wanted[:, 0], products.argmax(-1) + 7)
    for name, by in (("plain", None), ("turned", asked[:200])):
        build_index(vectors, total=3000, width=32, lists=30, storage="float32", seed=1, file=tmp_path / name, asked=by)
        found[name] = list(measure(tmp_path / name, asked[200:], wanted, 10))
        assert found[name][-1].first == 1.0
    assert found["turned"][2].probes == 4
    assert found["turned"][2].first > found["plain"][2].first + 0.1


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_the_same_step_gives_the_same_bytes(base, folder, tmp_path, storage):
    given = {"corpus": str(folder / "corpus.txt"), "size": 20, "min_count": 2, "queries": 16, "storage": storage}
    made = [
        Step().apply(open_checkpoint(base), LargeVocabularyParams.model_validate(given), Run("x", cache=cache))
        for cache in (tmp_path / "one", tmp_path / "two", None)
    ]
    for name, file in made[0].files.items():
        assert file.read() == made[1].files[name].read() == made[2].files[name].read(), name
    assert made[0].metrics == made[1].metrics
    checkpoint = open_checkpoint(base)
    outline = Step().plan(checkpoint, LargeVocabularyParams.model_validate(given))
    assert outline.deviations(made[0]) == []


def test_suppressed_ids_without_a_row_switch_no_row_off(base, tmp_path):
    """transformers compares ids with those of the rows, so -1 and 5000 suppress nothing."""
    import json
    import shutil

    copy = shutil.copytree(base, tmp_path / "copy")
    made = json.loads((copy / "generation_config.json").read_text()) | {"suppress_tokens": [-1, 7, 5000]}
    (copy / "generation_config.json").write_text(json.dumps(made | {"eos_token_id": [2, -1]}))
    (tmp_path / "bom.txt").write_bytes("\ufeffverzekering\r\n gezelligheid\r\n".encode())
    given = LargeVocabularyParams.model_validate({"tokens": str(tmp_path / "bom.txt"), "probes": 2, "lists": 4})
    step, checkpoint = Step(), open_checkpoint(copy)
    patch = step.apply(checkpoint, given, Run("x", cache=tmp_path))
    policy = json.loads(patch.files["large_vocabulary/policy.json"].read())
    without = sorted(set(range(330)) - set(toys.backend("byte-bpe").get_vocab().values()))
    assert policy["never"] == [7, *without]
    assert policy["always"] == [0, 1, 2, 3]
    data = load(patch.files["large_vocabulary/tokens.safetensors"].read())
    assert bytes(data["bytes"].tolist()) == b"verzekering gezelligheid"
    assert patch.metrics["rows"] == 330 + 2 - len(policy["never"])


def test_rows_by_the_hundred_thousand_do_not_fill_the_memory(tmp_path):
    """100k rows of 512 numbers are 205 MB; making them may take 60."""
    program = f"""
import resource
from pathlib import Path
import torch
from regraft.core.sources.open import open_checkpoint
from regraft.plugins.tokenizer_retrofit.large import rows
from regraft.plugins.tokenizer_retrofit.large.params import LargeVocabularyParams
from regraft.plugins.tokenizer_retrofit.tables import Tables
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
torch.set_num_threads(1)
checkpoint = open_checkpoint({str(tmp_path / "base")!r})
tables = Tables.of(checkpoint, TokenizerFile.of(checkpoint))
params = LargeVocabularyParams(probes=1)
few, many = ([(i % 300, i % 299, i % 7) for i in range(n)] for n in (5000, 100_000))
path = Path({str(tmp_path)!r})
rows.write_rows(path / "few", checkpoint, tables, few, params, print)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows.write_rows(path / "many", checkpoint, tables, many, params, lambda line: None)
for piece in rows.pieces(path / "many", "embeddings"):
    last = piece
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, float(last[-1].abs().sum()))
"""
    toys.save("llama", tmp_path / "base", hidden_size=512, intermediate_size=64, num_attention_heads=4, head_dim=16)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    grown, last = map(float, ran.stdout.splitlines()[-1].split())
    assert (tmp_path / "many").stat().st_size > 200e6
    assert last > 0
    assert grown < 60_000


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "give probes"),
        ({"size": 5, "probes": 1}, "size needs a corpus"),
        ({"size": 5, "corpus": "c.txt", "tokens": __file__}, "size or tokens"),
        ({"corpus": "c.txt", "init": "hypernet"}, "go together"),
        ({"corpus": "c.txt", "min_count": 9}, "min_count is for size"),
        ({"corpus": "c.txt", "probes": 3, "recall": 0.5}, "probes or recall"),
        ({"probes": 3, "lists": 2}, "more probes than lists"),
    ],
)
def test_keys_that_do_not_fit_are_refused(values, words):
    with pytest.raises(ValidationError, match=words):
        LargeVocabularyParams.model_validate(values)


def test_what_cannot_be_done_is_said_by_name(base, folder, tmp_path, monkeypatch):
    def refused(kind, words, where=base, **values):
        step, checkpoint = Step(), open_checkpoint(where)
        given = LargeVocabularyParams.model_validate(values)
        with pytest.raises(kind, match=words):
            step.check(checkpoint, given) or step.apply(checkpoint, given, Run("x", cache=tmp_path / words[:5]))

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "old.txt").write_text("the\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    refused(InputError, "no text", corpus=str(tmp_path / "empty.txt"), size=9)
    refused(InputError, "no new token", tokens=str(tmp_path / "empty.txt"), probes=1)
    refused(InputError, "no UTF-8 text", tokens=str(tmp_path / "binary.txt"), probes=1)
    refused(UsageError, "fewer rows than lists", corpus=str(folder / "corpus.txt"), lists=10**6)
    narrow = {"folder": str(test_hypernet.save(tmp_path / "narrow", n_embd=32, separate_out_embeddings=True))}
    listed = {"tokens": str(folder / "words.txt"), "probes": 1, "init": "hypernet"}
    (folder / "words.txt").write_text("verzekerde\n")
    refused(InputError, "made for another model", hypernet=narrow, **listed)
    tied = {"folder": str(test_hypernet.save(tmp_path / "tied"))}
    refused(Unsupported, "another kind of head", hypernet=tied, **listed)
    monkeypatch.setattr(
        "regraft.plugins.tokenizer_retrofit.large.library.find_spec",
        lambda name: None if name == "faiss" else find_spec(name),
    )
    refused(UsageError, r"(?s)needs faiss.*regraft\[faiss\]", corpus=str(folder / "corpus.txt"), size=9)
