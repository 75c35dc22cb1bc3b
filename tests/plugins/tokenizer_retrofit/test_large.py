"""`large-vocabulary`: stock weights, tokens beside them, and a search whose answers are those of the whole product."""

import importlib.util
import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.core.sources.open import open_checkpoint
from regraft.core.testing.conformance.subject import Subject
from regraft.core.testing.conformance.suite import conform
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.hypernet import open_hypernet, predict
from regraft.plugins.tokenizer_retrofit.large import LargeVocabulary as Step
from regraft.plugins.tokenizer_retrofit.large.params import LargeVocabularyParams
from tests.plugins.tokenizer_retrofit import test_hypernet, toys
from tests.running import done, tree, write_recipe

PROMPTS = ["De verzekering dekt de kosten van de verzekerde", "In the beginning was the word"]
STEP = {"use": "large-vocabulary", "corpus": "corpus.txt", "size": 60, "min_count": 2, "queries": 64}


@pytest.fixture(scope="module")
def base(folder):
    return toys.save("llama", folder / "base", rows=330, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def network(folder):
    return test_hypernet.save(folder / "net", separate_out_embeddings=True)


@pytest.fixture(scope="module")
def made(folder, base, network):
    """Rows from a random hypernetwork: its tokens are as likely as any, where means of rows never win."""
    hypernet = {**STEP, "init": "hypernet", "lists": 8, "candidates": 4, "storage": "float32"}
    text = write_recipe(folder / "large.toml", base, hypernet).read_text()
    text = text.replace("[output]", f'hypernet = {{ folder = "{network}" }}\n[output]')
    (folder / "large.toml").write_text(text)
    done("apply", folder / "large.toml", "-o", folder / "made")
    return folder / "made"


@pytest.fixture(scope="module")
def model(made):
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(made).eval()
    found.generation_config.eos_token_id = None
    return found


@pytest.fixture(scope="module")
def runtime(made):
    spec = importlib.util.spec_from_file_location("runtime_of_large", made / "large_vocabulary" / "runtime.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def all_rows(made, model, name="head"):
    """The model's own rows and the appended ones."""
    own = (model.get_output_embeddings() if name == "head" else model.get_input_embeddings()).weight.detach()
    return torch.cat([own, load_file(made / "large_vocabulary" / "rows.safetensors")[name]])


def test_what_stock_transformers_reads_is_the_base(base, made):
    old, new = tree(base), tree(made)
    assert {name for name in old if old[name] != new[name]} == set()
    parts = {f"large_vocabulary/{name}" for name in
             ("index.faiss", "policy.json", "rows.safetensors", "runtime.py", "tokens.safetensors")}  # fmt: skip
    assert parts <= set(new)
    done("apply", write_recipe(made.parent / "again.toml", made, dtype="float16"), "-o", made.parent / "again")
    assert {name: tree(made.parent / "again").get(name) for name in parts} == {name: new[name] for name in parts}


def test_texts_are_the_tokenizers_tokens_joined(made, model, runtime, base):
    large = runtime.LargeVocabulary(model)
    tokenizer = toys.backend("byte-bpe")
    weight = all_rows(made, model, "embeddings")
    for prompt in [*PROMPTS, "</s> zwart\twit  12", toys.DUTCH]:
        ids, data = large.encode(prompt)
        native = tokenizer.encode(prompt).ids
        assert large.lexicon.spelled(ids) == native
        assert large.decode(ids) == tokenizer.decode(native)
        assert b"".join(data).decode() == prompt
    assert len(large.encode(toys.DUTCH)[0]) < 0.7 * len(tokenizer.encode(toys.DUTCH).ids)
    batch = large.encode_batch(PROMPTS)
    for row, ids in enumerate(batch.ids):
        assert torch.equal(batch.inputs_embeds[row, -len(ids) :], weight[ids])
        assert batch.attention_mask[row].sum() == len(ids)


def plain_greedy(model, rows, inputs, prompt, steps, never):
    """One token after the other, the whole text read anew each time, every row multiplied."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            state = model.base_model(inputs_embeds=inputs[ids][None]).last_hidden_state[0, -1]
        logits = rows @ state
        logits[never] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_a_search_of_all_lists_writes_what_the_whole_product_says(made, model, runtime):
    policy = json.loads((made / "large_vocabulary" / "policy.json").read_text())
    everywhere = runtime.LargeVocabulary(model, probes=policy["lists"])
    exact = runtime.LargeVocabulary(model, exact=True)
    head, inputs = all_rows(made, model), all_rows(made, model, "embeddings")
    assert policy["candidates"] == 4
    assert policy["never"]
    wanted = [
        plain_greedy(model, head, inputs, everywhere.encode(prompt)[0], 12, policy["never"]) for prompt in PROMPTS
    ]
    assert any(index >= policy["rows"] for answer in wanted for index in answer)
    assert everywhere.generate(PROMPTS, max_new_tokens=12) == wanted
    assert exact.generate(PROMPTS, max_new_tokens=12) == wanted
    native = model(torch.tensor([[1, 5, 9]])).logits
    assert native.shape[-1] == policy["rows"]


def test_the_recall_of_the_index_is_told_and_chooses_the_lists_to_search(made, model, runtime):
    metrics = json.loads((made / "regraft.lock.json").read_text())["steps"][0]["metrics"]
    policy = json.loads((made / "large_vocabulary" / "policy.json").read_text())
    assert [one["probes"] for one in metrics["recall"]] == [1, 2, 4, 8]
    assert metrics["recall"][0]["top1"] < metrics["recall"][-1]["top1"] == 1.0
    enough = [one["probes"] for one in metrics["recall"] if one["top1"] >= 0.99]
    assert policy["probes"] == metrics["probes"] == enough[0]
    states = torch.randn(50, 64)
    head = all_rows(made, model)
    head[policy["never"]] = 0
    for probes, share in ((1, None), (8, 1.0)):
        found = runtime.Index(made / "large_vocabulary" / "index.faiss", probes).find(states, 4)
        hits = (found == (states @ head.T).argmax(-1)[:, None]).any(-1).float().mean()
        assert hits == share if share else hits < 1.0


def test_the_end_of_a_text_is_reached_wherever_the_index_looks(made, model, runtime):
    head = model.get_output_embeddings().weight
    before = head.detach().clone()
    large = runtime.LargeVocabulary(model, probes=1, candidates=1)
    answer = large.generate(PROMPTS[:1], max_new_tokens=8)[0]
    assert len(answer) == 8
    try:
        with torch.no_grad():  # far from where the index has it, so that no search of one list finds it
            head[2] = head[2] + 100 * large.head.rows.take(torch.tensor(answer[3:4]))[0]
        found = large.generate(PROMPTS[:1], max_new_tokens=8, eos_token_id=[2])[0]
        assert len(found) < 8
        assert found == answer[: len(found)]
        assert 2 not in large.head.index.find(torch.randn(20, 64), 1)
        with pytest.raises(ValueError, match="cannot end answers"):
            large.generate(PROMPTS[:1], eos_token_id=[200])
    finally:
        with torch.no_grad():
            head.copy_(before)


def test_what_a_search_or_an_answer_cannot_begin_with_is_refused(made, model, runtime):
    for given in ({"probes": 0}, {"candidates": 0}):
        with pytest.raises(ValueError, match="finds nothing"):
            runtime.LargeVocabulary(model, **given)
    large = runtime.LargeVocabulary(model)
    with pytest.raises(ValueError, match="no prompt"):
        large.generate([])
    with pytest.raises(ValueError, match="give a list of texts"):
        large.generate(PROMPTS[0])
    with pytest.raises(ValueError, match="min_p is a share"):
        large.generate(PROMPTS[:1], temperature=1.0, min_p=2.0)
    assert large.generate(PROMPTS[:1], max_new_tokens=2, eos_token_id=2) == large.generate(
        PROMPTS[:1], max_new_tokens=2, eos_token_id=[2]
    )


def test_draws_come_from_the_candidates_and_follow_the_generator(made, model, runtime):
    large = runtime.LargeVocabulary(model)
    drawn = [
        large.generate(PROMPTS[:1], max_new_tokens=6, temperature=5.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = large.generate(PROMPTS[:1], max_new_tokens=6)
    assert large.generate(PROMPTS[:1], max_new_tokens=6, temperature=5.0, min_p=1.0) == greedy


def test_rows_are_those_of_the_initialiser_in_whatever_batches(
    made, model, network, base, folder, tmp_path, monkeypatch
):
    tensors = load_file(made / "large_vocabulary" / "tokens.safetensors")
    ends = [0, *tensors["part_ends"].tolist()]
    parts = [tensors["parts"][start:end].tolist() for start, end in pairwise(ends)]
    table = torch.cat([model.get_input_embeddings().weight, model.get_output_embeddings().weight], 1).detach()
    wanted = predict(open_hypernet(network), parts, table)
    rows = load_file(made / "large_vocabulary" / "rows.safetensors")
    torch.testing.assert_close(rows["embeddings"], wanted[0])
    torch.testing.assert_close(rows["head"], wanted[1])
    monkeypatch.setattr("regraft.plugins.tokenizer_retrofit.large.rows.ROWS_AT_ONCE", 7)
    given = {**STEP, "corpus": str(folder / "corpus.txt")}
    given.pop("use")
    patch = Step().apply(open_checkpoint(base), LargeVocabularyParams.model_validate(given), Run("x", cache=tmp_path))
    means = load_file(patch.files["large_vocabulary/rows.safetensors"].path)
    for name, module in (("embeddings", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        exact = torch.stack([module.weight.detach()[part].double().mean(0) for part in parts])
        assert torch.allclose(means[name].double(), exact, atol=1e-7)


@pytest.mark.parametrize(("family", "kind"), [("gemma2", "piece-bpe"), ("gpt2", "byte-bpe"), ("qwen3", "unigram")])
def test_families_with_caps_scales_and_tied_heads_give_their_own_logits(tmp_path, runtime, family, kind):
    from transformers import AutoModelForCausalLM

    options = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    base = toys.save(family, tmp_path / "base", kind=kind, **options)
    (tmp_path / "tokens.txt").write_text("verzekerde\n verzekerde\n gezelligheid\nbeginning\n beginning\n\n the\n")
    given = {"tokens": str(tmp_path / "tokens.txt"), "probes": 2, "lists": 4}
    patch = Step().apply(open_checkpoint(base), LargeVocabularyParams.model_validate(given), Run("x", cache=tmp_path))
    (base / "large_vocabulary").mkdir()
    for name, file in patch.files.items():
        file.copy_to(base / name)
    assert patch.metrics["tokens"] >= 3
    assert patch.metrics["recall"] == []
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    exact = runtime.LargeVocabulary(model, base, exact=True)
    ids, _ = exact.encode("De verzekerde gezelligheid")
    assert max(ids) >= exact.policy["rows"]
    plain = exact.lexicon.spelled(ids)
    with torch.no_grad():
        assert torch.allclose(exact.embed(torch.tensor(plain)), model.get_input_embeddings()(torch.tensor(plain)))
        native = model(torch.tensor([plain])).logits[:, -1]
        with exact._candidates() as head:
            found = model(torch.tensor([plain])).logits
        found = head.masked(found)[:, : exact.policy["rows"]]
    assert torch.allclose(found, native, atol=1e-5)
    if family == "gemma2":
        assert native.abs().max() < 3.0
    assert len(exact.generate(["De verzekerde"], max_new_tokens=3, eos_token_id=[])[0]) == 3


def test_without_new_tokens_the_models_own_rows_are_searched(base, folder, tmp_path, runtime):
    from transformers import AutoModelForCausalLM

    step = {"use": "large-vocabulary", "corpus": "corpus.txt", "queries": 32, "recall": 1.0}
    done("apply", write_recipe(folder / "own.toml", base, step), "-o", folder / "own")
    model = AutoModelForCausalLM.from_pretrained(folder / "own").eval()
    model.generation_config.eos_token_id = None
    large = runtime.LargeVocabulary(model, folder / "own", probes=10**6)
    ids = torch.tensor([large.encode(PROMPTS[0])[0]])
    native = model.generate(ids, do_sample=False, max_new_tokens=8, suppress_tokens=large.policy["never"])
    assert large.generate(PROMPTS[:1], max_new_tokens=8) == [native[0, ids.shape[1] :].tolist()]


def test_the_runtime_works_in_a_process_without_regraft(made):
    program = f"""
import sys
sys.modules["regraft"] = None
sys.path.insert(0, {str(made / "large_vocabulary")!r})
from runtime import LargeVocabulary
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(made)!r})
large = LargeVocabulary(model)
answers = large.generate(["De verzekerde"], max_new_tokens=3, eos_token_id=[])
print(len(answers[0]), repr(large.decode(answers[0])))
sys.modules["faiss"] = None
try:
    LargeVocabulary(model)
except ValueError as error:
    print(error)
print(len(LargeVocabulary(model, exact=True).generate(["De"], max_new_tokens=2, eos_token_id=[])[0]))
"""
    ran = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=200, check=False
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("3 ")
    assert "pip install faiss-cpu" in lines[1]
    assert lines[2] == "2"


def test_changed_weights_are_warned_about_and_missing_files_named(made, model, runtime, tmp_path):
    import shutil

    copy = shutil.copytree(made, tmp_path / "copy")
    rows = load_file(copy / "large_vocabulary" / "rows.safetensors")
    save_file({**rows, "probe_rows": rows["probe_rows"] + 1}, copy / "large_vocabulary" / "rows.safetensors")
    with pytest.warns(UserWarning, match="embeddings have changed"):
        runtime.LargeVocabulary(model, copy)
    (copy / "large_vocabulary" / "index.faiss").unlink()
    save_file(rows, copy / "large_vocabulary" / "rows.safetensors")
    with pytest.raises(ValueError, match=r"index.faiss is missing"):
        runtime.LargeVocabulary(model, copy)
    (copy / "large_vocabulary" / "rows.safetensors").unlink()
    with pytest.raises(ValueError, match=r"rows.safetensors is missing"):
        runtime.LargeVocabulary(model, copy)


def test_without_faiss_its_conformance_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("regraft.plugins.tokenizer_retrofit.large.library.find_spec", lambda name: None)
    (outcome,) = conform(Subject(Step, tmp_path, families=("llama",)))
    assert outcome.status == "not applicable"
    assert outcome.message.endswith("faiss, which is not installed: pip install 'regraft[faiss]'")
