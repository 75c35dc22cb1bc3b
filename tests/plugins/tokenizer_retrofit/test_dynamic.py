"""`dynamic-tokenization`: a checkpoint that is what it was, and a runtime in it that feeds the model merged tokens."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from regraft.core.checkpoint import FileRef
from regraft.core.errors import InputError, Unsupported
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.dynamic import DynamicTokenization as Step
from regraft.plugins.tokenizer_retrofit.dynamic.params import DynamicTokenizationParams
from tests.plugins.tokenizer_retrofit import toys
from tests.plugins.tokenizer_retrofit.dynamic import PROMPTS, applied, language_model, runtime, without_regraft
from tests.running import regraft, tree, write_recipe


@pytest.fixture(scope="module")
def base(folder):
    return toys.save("llama", folder / "base")


@pytest.fixture(scope="module")
def bert(folder):
    """A family without a row in regraft's table, and a task without a language-model head."""
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    tokenizer = toys.backend("wordpiece")
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForTokenClassification(config).save_pretrained(folder / "bert")
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "bert")
    return folder / "bert"


@pytest.fixture(scope="module")
def decoder(folder, base):
    return applied(folder, base, "decoder", reduction=0.6, corpus="corpus.txt")


@pytest.fixture(scope="module")
def encoder(folder, bert):
    return applied(folder, bert, "encoder", merges=40)


def test_weights_tokenizer_and_config_are_those_of_the_base(base, decoder, bert, encoder):
    for before, after in ((base, decoder), (bert, encoder)):
        old, new = tree(before), tree(after)
        assert {name for name in old if old[name] != new[name]} == set()
        assert {name for name in set(new) - set(old) if "dynamic" in name} >= {
            "dynamic_tokenization", "dynamic_tokenization/policy.json", "dynamic_tokenization/runtime.py"
        }  # fmt: skip
    assert "dynamic_tokenization/composer.safetensors" not in tree(decoder)


def test_without_merges_the_model_reads_the_embedding_lookup_and_answers_as_ever(decoder):
    from transformers import AutoTokenizer

    model = language_model(decoder)
    dynamic = runtime(decoder).DynamicTokenization(model, merges=0)
    tokenizer = AutoTokenizer.from_pretrained(decoder, padding_side="left")
    native = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    batch = dynamic.encode_batch(PROMPTS)
    assert torch.equal(batch.attention_mask, native["attention_mask"])
    assert batch.attention_mask[1, 0] == 0
    assert torch.equal(batch.inputs_embeds, model.get_input_embeddings()(native["input_ids"]))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    answers = model.generate(native["input_ids"], attention_mask=native["attention_mask"], **options)
    assert torch.equal(dynamic.generate(PROMPTS, **options), answers[:, native["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("kind", "template"), [("byte-bpe", "<s> $A"), ("piece-bpe", "<s> $A </s>"), ("unigram", "$A </s>")]
)
def test_a_score_without_merges_is_that_of_the_text_cut_whole(folder, kind, template):
    from tokenizers import Tokenizer

    base = with_template(toys.save("llama", folder / f"{kind}-base", kind), template)
    made = applied(folder, base, kind, merges=0)
    model, tokenizer = language_model(made), Tokenizer.from_file(str(made / "tokenizer.json"))
    module = runtime(made)
    dynamic = module.DynamicTokenization(model)
    first = [1] * template.startswith("<s>")
    for prompt, continuation in [(PROMPTS[1], " with the makers"), ("All", " things</s> were"), ("It", "")]:
        ids = [*first, *tokenizer.encode(prompt + continuation, add_special_tokens=False).ids]
        start = len(first) + len(tokenizer.encode(prompt, add_special_tokens=False).ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = -sum(float(logits[n - 1, ids[n]]) for n in range(start, len(ids))) / math.log(2)
        bits, size = dynamic.score(prompt, continuation)
        assert bits == pytest.approx(wanted, rel=1e-5, abs=1e-9)
        assert size == len(continuation)
        assert module.DynamicTokenization(model, merges=1000).score(prompt, continuation)[1] == size
    text = "All things were made by them"
    pieces = tokenizer.encode(text, add_special_tokens=False)
    start, end = next((start, end) for start, end in pieces.offsets if start and end - start > 2)
    with pytest.raises(ValueError, match="the tokenizer cuts the end of the prompt, 'All"):
        dynamic.score(text[: end - 1], text[end - 1 :])
    if first:
        assert dynamic.score("", "In the")[0] > 0
    else:
        with pytest.raises(ValueError, match="no token"):
            dynamic.score("", "In the")


def with_template(folder, template):
    """The tokenizer puts other tokens around texts."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    specials = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("family", ["gpt2", "llama", "roberta"])
def test_padding_in_front_moves_no_place(folder, family):
    made = applied(folder, saved(folder, family), f"{family}-made", merges=3, scope="example")
    model = language_model(made)
    dynamic = runtime(made).DynamicTokenization(model)
    texts = [*PROMPTS, "It"]
    inputs = dynamic.encode_batch(texts).inputs()
    assert inputs["attention_mask"][:, 0].tolist() == [1, 0, 0]
    with torch.no_grad():
        together = model(**inputs).logits[:, -1]
        for text, logits in zip(texts, together, strict=True):
            alone = dynamic.encode_batch([text])
            assert torch.allclose(model(**alone.inputs()).logits[0, -1], logits, atol=1e-5)
            assert "position_ids" not in alone.inputs()
    dynamic.positioned = False
    assert "position_ids" not in dynamic.encode_batch(texts).inputs()


def saved(folder, family):
    """A tiny decoder; RoBERTa's count their places from behind that of padding."""
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForCausalLM

    if family != "roberta":
        return toys.save(family, folder / f"{family}-placed")
    config = RobertaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, is_decoder=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RobertaForCausalLM(config)
    torch.nn.init.normal_(model.roberta.embeddings.position_embeddings.weight)
    model.save_pretrained(folder / "roberta-placed")
    PreTrainedTokenizerFast(tokenizer_object=toys.backend("byte-bpe"), pad_token="<pad>").save_pretrained(
        folder / "roberta-placed"
    )
    return folder / "roberta-placed"


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_a_model_of_learnt_places_answers_padded_prompts_as_ever(folder, options):
    from transformers import AutoTokenizer, set_seed

    made = folder / "gpt2-made"
    model = language_model(made)
    native = AutoTokenizer.from_pretrained(made, padding_side="left")(PROMPTS, return_tensors="pt", padding=True)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, **options}
    set_seed(1)
    wanted = model.generate(**native, **options)[:, native["input_ids"].shape[1] :]
    set_seed(1)
    assert torch.equal(runtime(made).DynamicTokenization(model, merges=0).generate(PROMPTS, **options), wanted)


def test_merged_prompts_are_shorter_and_padding_changes_no_answer(decoder):
    model, module = language_model(decoder), runtime(decoder)
    dynamic = module.DynamicTokenization(model, scope="example")
    plain = module.DynamicTokenization(model, merges=0)
    batch = dynamic.encode_batch(PROMPTS)
    assert batch.inputs_embeds.shape[1] < 0.7 * plain.encode_batch(PROMPTS).inputs_embeds.shape[1]
    assert [b"".join(text) for text in batch.token_bytes] == [prompt.encode() for prompt in PROMPTS]
    for text, prompt in zip(batch.tokens, PROMPTS, strict=True):
        assert [prompt[token.start : token.end].encode() for token in text] == [token.data for token in text]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = dynamic.generate(PROMPTS, **options)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert torch.equal(dynamic.generate([prompt], **options)[0], answer)
    own = {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask}
    alone = dynamic.encode_batch(PROMPTS[1:])
    with torch.no_grad():
        padded = model(**own, position_ids=batch.position_ids).logits[1, -1]
        single = model(**alone.inputs()).logits[0, -1]
    assert torch.allclose(padded, single, atol=1e-5)


def test_a_merged_token_is_the_row_with_its_bytes_or_the_mean_of_those_that_spell_it(decoder):
    model = language_model(decoder)
    dynamic = runtime(decoder).DynamicTokenization(model, merges=1000)
    weight = model.get_input_embeddings().weight
    batch = dynamic.encode_batch(PROMPTS)
    merged = [(row, place, token) for row, text in enumerate(batch.tokens) for place, token in enumerate(text)
              if len(token.ids) > 1]  # fmt: skip
    assert len(merged) > 5
    for row, place, token in merged:
        spelled = list(dynamic.merger.spelling.ids(token.data))
        wanted = weight[spelled].double().mean(0).float()
        at = place - len(batch.tokens[row])
        assert torch.allclose(batch.inputs_embeds[row, at], wanted, atol=1e-7)


def test_the_cache_keeps_the_batch_at_hand_and_forgets_rows_when_embeddings_change(decoder):
    model = language_model(decoder)
    dynamic = runtime(decoder).DynamicTokenization(model, merges=1000, cache_rows=2)
    first = dynamic.encode_batch(PROMPTS[:1])
    held = list(dynamic.composer.cache)
    assert set(held) == {token.data for token in first.tokens[0] if len(token.ids) > 1}
    assert len(held) > 2
    dynamic.encode_batch(["the kosten"])
    assert len(dynamic.composer.cache) == 2
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    assert torch.allclose(dynamic.encode_batch(PROMPTS[:1]).inputs_embeds, 2 * first.inputs_embeds)


def test_the_reduction_is_measured_on_the_corpus_and_chooses_the_merges(decoder, base, folder):
    policy = json.loads((decoder / "dynamic_tokenization" / "policy.json").read_text())
    metrics = json.loads((decoder / "regraft.lock.json").read_text())["steps"][0]["metrics"]
    reached = [row for row in policy["reductions"] if row[1] >= 0.6]
    assert policy["merges"] == metrics["merges"] > 0
    assert reached[0][0] >= policy["merges"]
    assert 0.6 <= metrics["reduction"] < 0.7
    model = language_model(decoder)
    for reduction in (0.0, 0.3, 1.0):
        dynamic = runtime(decoder).DynamicTokenization(model, reduction=reduction)
        row = next(row for row in policy["reductions"] if row[1] >= reduction)
        assert dynamic.merges == row[0]
    assert policy["reductions"][0] == [0, 0.0, 0.0]
    assert policy["reductions"][-1][1] == 1.0
    assert (decoder / "regraft" / "dynamic-tokenization" / "reduction.png").read_bytes().startswith(b"\x89PNG")
    again = applied(folder, base, "again", reduction=0.6, corpus="corpus.txt")
    assert tree(again)["dynamic_tokenization/policy.json"] == tree(decoder)["dynamic_tokenization/policy.json"]


def test_an_encoder_pads_right_and_labels_follow_the_left_part(encoder):
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    model = AutoModelForTokenClassification.from_pretrained(encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    module = runtime(encoder)
    plain = module.DynamicTokenization(model, merges=0)
    native = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = model(input_ids=native["input_ids"], attention_mask=native["attention_mask"]).logits
        assert torch.equal(model(**plain.encode_batch(PROMPTS).inputs()).logits, wanted)
    dynamic = module.DynamicTokenization(model)
    counted = [list(range(len(text))) for text in plain.encode_batch(PROMPTS).tokens]
    batch = dynamic.encode_batch(PROMPTS, labels=counted)
    assert batch.attention_mask[1, -1] == 0
    assert batch.labels[1, -1] == module.IGNORED
    for row, text in enumerate(batch.tokens):
        assert batch.labels[row, : len(text)].tolist() == [token.first for token in text]
    assert any(len(token.ids) > 1 for text in batch.tokens for token in text)
    words = [prompt.split() for prompt in PROMPTS]
    few = module.DynamicTokenization(model, merges=2)
    tags = [[place % 3 for place, _ in enumerate(text)] for text in words]
    for every in (False, True):
        batch = few.encode_batch(words, labels=tags, label_every_token=every)
        for row, text in enumerate(batch.tokens):
            heads = [token.word for place, token in enumerate(text)
                     if token.word is not None and (every or text[place - 1].word != token.word)]  # fmt: skip
            kept = batch.labels[row][batch.labels[row] != module.IGNORED].tolist()
            assert kept == [tags[row][word] for word in heads]
            assert set(heads) == set(range(len(words[row])))
    loss = model(**few.encode_batch(words, labels=tags).inputs()).loss
    assert torch.isfinite(loss)
    with pytest.raises(ValueError, match="labels"):
        few.encode_batch(words, labels=[[0], [1]])
    with pytest.raises(ValueError, match="encoders"):
        dynamic.generate(PROMPTS)


def test_texts_that_cannot_be_read_are_refused(decoder):
    dynamic = runtime(decoder).DynamicTokenization(language_model(decoder))
    assert dynamic.encode_batch([]).inputs_embeds.shape == (0, 0, 64)
    assert dynamic.encode_batch([[], ["a", "b"]]).token_bytes == [[b""], [b"", b"a", b"b"]]
    for texts in (PROMPTS[0], [PROMPTS[0], ["two", "words"]]):
        with pytest.raises(ValueError, match="give a list of texts"):
            dynamic.encode_batch(texts)
    for prompts in ([], ["", "It"]):
        with pytest.raises(ValueError, match="no token"):
            dynamic.generate(prompts, add_special_tokens=False, max_new_tokens=1)
    assert len(dynamic.encode_batch(PROMPTS[:1], max_length=2).tokens[0]) == 2
    with pytest.raises(ValueError, match="max_length is 0, and 1 at the least"):
        dynamic.encode_batch(PROMPTS, max_length=0)
    assert dynamic.encode_batch(["</s></s>It"]).token_bytes[0][:3] == [b"", b"</s>", b"</s>"]


def test_the_runtime_works_in_a_process_without_regraft(decoder):
    assert without_regraft(decoder) == "1"


def test_the_runtime_neither_pads_nor_cuts_off_as_tokenizer_json_says(folder, base):
    shutil.copytree(base, folder / "padding")
    document = json.loads((base / "tokenizer.json").read_text())
    padding = {"pad_id": 0, "pad_token": "<pad>", "pad_type_id": 0, "pad_to_multiple_of": None}
    document["padding"] = {"strategy": "BatchLongest", "direction": "Right", **padding}
    document["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (folder / "padding" / "tokenizer.json").write_text(json.dumps(document))
    made = applied(folder, folder / "padding", "padding-made", merges=0)
    dynamic = runtime(made).DynamicTokenization(language_model(made))
    cut = dynamic.encode_batch(PROMPTS, add_special_tokens=False).token_bytes
    assert [b"".join(one) for one in cut] == [prompt.encode() for prompt in PROMPTS]


def test_a_policy_is_refused_for_another_tokenizer(decoder, tmp_path):
    copy = shutil.copytree(decoder, tmp_path / "copy")
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(ValueError, match="has changed since"):
        runtime(copy).DynamicTokenization(language_model(copy))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "merges or reduction"),
        ({"merges": 1, "reduction": 0.5, "corpus": "c.txt"}, "merges or reduction"),
        ({"reduction": 0.5}, "measured on a corpus"),
        ({"merges": 1, "composer": "table"}, "made for a corpus"),
        ({"merges": 1, "table_size": 5}, "leave them out"),
        ({"merges": 1, "composer": "hypernet"}, "go together"),
    ],
)
def test_keys_that_do_not_fit_are_refused(values, words):
    with pytest.raises(ValidationError, match=words):
        DynamicTokenizationParams.model_validate(values)


def test_what_cannot_be_done_is_said_before_anything_is_written(folder, base, bert, tmp_path):
    step, run = Step(), Run("dynamic")
    (tmp_path / "empty.txt").write_text("")
    given = DynamicTokenizationParams.model_validate({"reduction": 0.5, "corpus": str(tmp_path / "empty.txt")})
    with pytest.raises(InputError, match="no text"):
        step.apply(open_checkpoint(base), given, run)
    toys.save("llama", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    recipe = write_recipe(tmp_path / "r.toml", tmp_path / "bare", {"use": "dynamic-tokenization", "merges": 1})
    ran = regraft("apply", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "no fast form" in ran.err
    assert not (tmp_path / "out").exists()
    layers = open_checkpoint(base)
    config = {**layers.config, "hidden_size_per_layer_input": 8}
    deep = replace(layers, files={**layers.files, "config.json": FileRef(data=json.dumps(config).encode())})
    with pytest.raises(Unsupported, match="in every layer"):
        step.check(deep, DynamicTokenizationParams(merges=1))
    plan = step.plan(open_checkpoint(bert), DynamicTokenizationParams(merges=1))
    assert set(plan.files) == {"dynamic_tokenization/policy.json", "dynamic_tokenization/runtime.py"}
    assert not plan.specs
