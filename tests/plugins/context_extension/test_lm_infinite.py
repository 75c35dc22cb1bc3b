"""LM-Infinite against every pair of tokens by hand, against the stock models, and with the cache that drops keys."""

import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.core.errors import Unsupported
from regraft.core.portable_code import portable_code, prove, read_template
from regraft.core.sources.folder import open_folder
from regraft.plugins.context_extension import lm_infinite
from regraft.plugins.context_extension.params import ContextExtensionParams
from tests.plugins.context_extension.support import WINDOW, Extended, apply, extend, load, params, rewrite_config, save

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "gpt_neox", "olmo2", "glm4", "granite", "smollm3",
            "starcoder2")  # fmt: skip
FIRST = 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Extended]:
    made: dict[Any, Extended] = {}

    def make(family: str = "llama", **overrides: Any) -> Extended:
        key = (family, *sorted(overrides.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            base = save(family, folder / "base", **overrides)
            made[key] = extend(base, folder / "out", method="lm-infinite", global_branch=FIRST)
        return made[key]

    return make


def ids(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (rows, count), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens, **options).logits
    return found


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((one - other).abs().max() < tolerance)


def code(local: int, first: int, limit: int) -> types.ModuleType:
    """The modeling file as a module."""
    sizes = {"local_branch": local, "global_branch": first, "limit_distance": limit}
    name = f"test_lm_infinite_{local}_{first}_{limit}"
    literals = {**sizes, "stock_class": "LlamaForCausalLM", "name": name, "renamed": None}
    template = read_template(lm_infinite.__package__, f"{lm_infinite.MODULE}.py.template")
    module = types.ModuleType("lm_infinite_under_test")
    module.__dict__["__name__"] = __name__  # where dataclasses look for it
    exec(portable_code(template, literals), module.__dict__)
    return module


def angles(positions: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10.0 ** -torch.arange(0, dim, 2, dtype=torch.float64)[: dim // 2]
    turns = positions.double()[..., None] * frequencies
    return torch.cat([turns, turns], -1).cos(), torch.cat([turns, turns], -1).sin()


def rotated(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    cos, sin = angles(positions, states.shape[-1])
    half = states.shape[-1] // 2
    return states * cos + torch.cat([-states[..., half:], states[..., :half]], -1) * sin


def by_hand(query: Any, key: Any, value: Any, sizes: tuple[int, int, int]) -> torch.Tensor:
    """Every pair of a query and a key rotated by its own distance; [1, H, L, d], not rotated before."""
    local, first, limit = sizes
    count, dim = query.shape[-2:]
    out = torch.zeros_like(query)
    for p in range(count):
        kept = [k for k in range(p + 1) if p - k < local or k < first]
        away = torch.tensor([p - k if p - k < local else limit for k in kept])
        turned = rotated(query[:, :, p : p + 1].expand(-1, -1, len(kept), -1), away)
        scores = (turned * key[:, :, kept]).sum(-1) / math.sqrt(dim)
        out[:, :, p] = (scores.softmax(-1)[..., None] * value[:, :, kept]).sum(-2)
    return out


@pytest.mark.parametrize("sizes", [(16, 4, 16), (7, 3, 5), (16, 0, 16), (200, 4, 200)])
def test_the_two_branches_are_the_definition(sizes: tuple[int, int, int]) -> None:
    _, first, limit = sizes
    module, random, count = code(*sizes), torch.Generator().manual_seed(1), 150
    query, key, value = (torch.randn(1, heads, count, 8, generator=random).double() for heads in (4, 2, 2))
    places, early = torch.arange(count)[None], min(first, count)
    turns = angles(limit - places, 8), angles(-places[:, :early], 8)
    told = module.Places(places, places, torch.ones(1, count, dtype=torch.bool), early, *turns)
    found, _ = module.lambda_attention(
        types.SimpleNamespace(), rotated(query, places), rotated(key, places), value, None, lm_infinite=told
    )
    expected = by_hand(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), sizes)
    assert close(found.transpose(1, 2), expected, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_itself_within_the_window_and_forgets_the_middle_beyond(family: str, exported: Any) -> None:
    """One layer: what the last token sees is its first and its last tokens, wherever they stand."""
    made = exported(family, num_hidden_layers=1)
    model = load(made.folder, trust_remote_code=True)
    assert close(logits(model, ids(WINDOW, 2)), logits(load(made.base), ids(WINDOW, 2)))
    text = ids(100)
    shorter = torch.cat([text[:, :FIRST], text[:, -WINDOW - 7 :]], 1)
    assert close(logits(model, text)[:, -1], logits(model, shorter)[:, -1])
    other = torch.cat([text[:, :1] - 1, text[:, 1:]], 1)
    assert not close(logits(model, text)[:, -1], logits(model, other)[:, -1], 1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_pieces_padding_and_batches_change_nothing(family: str, exported: Any) -> None:
    model = load(exported(family).folder, trust_remote_code=True)
    text = ids(70, 2)
    full = logits(model, text, use_cache=False)
    pieces, cache = [], None
    for start, stop in ((0, 19), (19, 20), (20, 21), (21, 50), (50, 70)):
        with torch.no_grad():
            outputs = model(text[:, start:stop], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    assert close(torch.cat(pieces, 1), full)
    assert close(logits(model, text[1:]), full[1:])
    padding = torch.zeros(1, 9, dtype=torch.int64)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(text[:1])], 1)
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as transformers' generate gives them
    for options in ({}, {"position_ids": places}):
        left = logits(model, torch.cat([padding, text[:1]], 1), attention_mask=mask, **options)
        assert close(left[:, 9:], full[:1])
    right = logits(model, torch.cat([text[:1], padding], 1), attention_mask=mask.flip(1).bool())
    assert close(right[:, :-9], full[:1])


def test_generation_is_the_same_without_a_cache_with_padding_and_in_beams(exported: Any) -> None:
    model = load(exported().folder, trust_remote_code=True)
    text = ids(30, 2)
    wanted = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(text, attention_mask=torch.ones_like(text), **wanted)
    assert cached.equal(model.generate(text, attention_mask=torch.ones_like(text), use_cache=False, **wanted))
    row = torch.cat([torch.zeros(1, 5, dtype=torch.int64), text[:1, 5:]], 1)
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    mixed = model.generate(torch.cat([row, text[1:]]), attention_mask=mask, **wanted)
    alone = model.generate(text[:1, 5:], attention_mask=torch.ones(1, 25, dtype=torch.int64), **wanted)
    assert mixed[1].equal(cached[1])
    assert mixed[0, 30:].equal(alone[0, 25:])
    beams = {**wanted, "num_beams": 2}
    searched = model.generate(text, attention_mask=torch.ones_like(text), **beams)
    assert searched.equal(model.generate(text, attention_mask=torch.ones_like(text), use_cache=False, **beams))


def test_the_cache_stays_as_large_as_what_can_be_seen(exported: Any) -> None:
    model = load(exported().folder, trust_remote_code=True)
    cache, sizes = None, []
    for token in ids(120)[0]:
        with torch.no_grad():
            cache = model(token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values
        sizes.append({tensor.numel() for layer in cache.layers for tensor in (layer.keys, layer.values)})
    assert cache.get_seq_length() == 120
    assert cache.layers[0].keys.shape[-2] == FIRST + WINDOW - 1
    assert sizes[FIRST + WINDOW - 2 :] == [sizes[-1]] * (120 - FIRST - WINDOW + 2)


def test_other_caches_masks_and_attention_functions_are_refused_in_words(exported: Any) -> None:
    from transformers import DynamicCache, StaticCache

    folder = exported().folder
    model = load(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="not StaticCache"):
        model(ids(5), past_key_values=StaticCache(config=model.config, max_cache_len=20))
    filled = DynamicCache()
    filled.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    with pytest.raises(ValueError, match="give an empty DynamicCache"):
        model(ids(5), past_key_values=filled)
    with pytest.raises(ValueError, match="cannot be cut back"):
        model(ids(5), use_cache=True).past_key_values.layers[0].crop(2)
    with pytest.raises(ValueError, match=r"attention_mask of \[batch, tokens\]"):
        model(ids(5), attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="attention_mask is for 4 tokens"):
        model(ids(5), attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="this checkpoint has regraft_lm_infinite"):
        load(folder, trust_remote_code=True, attn_implementation="eager")


def test_gradients_are_numbers(exported: Any) -> None:
    model = load(exported().folder, trust_remote_code=True).requires_grad_(True)
    text = ids(60)
    model(text, labels=text, use_cache=False).loss.backward()
    gradients = [weight.grad for weight in model.parameters()]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert float(gradients[-1].norm()) > 0


def test_the_export_works_without_regraft_and_not_without_its_code(exported: Any) -> None:
    proof = prove(exported().folder)
    assert proof.ok, proof.error
    assert "regraft_lm_infinite_llama_16_4_16" in proof.report["untrusted"]
    assert exported().patch.edits == {}


def test_perplexity_stays_where_the_plain_model_diverges(tmp_path: Path) -> None:
    """demo:tiny knows 256 tokens; two books of the Bible have 5718 of its own."""
    from importlib.resources import files

    from regraft.core.demo import TINY
    from regraft.core.loaded import opened

    made = extend(Path(TINY), tmp_path / "out", method="lm-infinite", target_length=4096)
    stock = opened("demo:tiny", device="cpu", dtype="float32").load()
    ours = opened(str(made.folder), device="cpu", dtype="float32", trust_remote_code=True).load().model
    books = files("regraft.recipes").joinpath("ruth-and-jonah.txt").read_text()
    plain, begin = stock.model, torch.zeros(16, 1, dtype=torch.int64)
    text = torch.tensor([[0, *stock.tokenizer(books, add_special_tokens=False)["input_ids"]]])[:, :4096]

    def loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        log_p = logits(model, tokens, use_cache=False)[:, :-1].log_softmax(-1)
        return -log_p.gather(2, tokens[:, 1:, None])[..., 0]

    windows = torch.cat([begin, text[0, 1:4081].view(16, 255)], 1)
    inside = loss(plain, windows).mean().exp()
    for length in (1024, 4096):
        beyond, lost = (loss(model, text[:, :length])[:, 256:].mean().exp() for model in (ours, plain))
        assert beyond < 1.5 * inside
        assert lost > 2 * inside


@pytest.mark.parametrize(
    ("family", "values", "where"),
    [
        ("gemma2", {}, "config.json: model_type"),
        ("gemma3_text", {}, "config.json: model_type"),
        ("stablelm", {}, "config.json: model_type"),
        ("llama", {"local_branch": 17}, "local_branch"),
        ("llama", {"limit_distance": 17}, "limit_distance"),
    ],
)
def test_what_cannot_be_done_is_refused(family: str, values: Any, where: str, tmp_path: Path) -> None:
    base = open_folder(save(family, tmp_path / "base"), label="base")
    with pytest.raises(Unsupported) as refused:
        apply(base, method="lm-infinite", **values)
    assert refused.value.where == where
    assert refused.value.remedy


def test_sliding_windows_other_code_and_other_heads_are_refused(tmp_path: Path) -> None:
    for changes, where in (
        ({"sliding_window": 8}, "config.json: sliding_window"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "config.json: auto_map"),
        ({"architectures": ["MistralForTokenClassification"]}, "config.json: architectures"),
    ):
        folder = save("mistral", tmp_path / where.rpartition(" ")[2])
        rewrite_config(folder, changes)
        with pytest.raises(Unsupported) as refused:
            apply(open_folder(folder, label="base"), method="lm-infinite")
        assert refused.value.where == where


def test_parameters_of_other_methods_are_refused() -> None:
    for values, message in (
        ({"method": "yarn", "local_branch": 8}, "local_branch belongs to lm-infinite"),
        ({"method": "lm-infinite", "rope_theta": 1e6}, "rope_theta belongs to"),
        ({"method": "lm-infinite", "probe": True}, "entropy = false"),
        ({"method": "lm-infinite", "tune": {"data": "x.jsonl"}}, "remove tune"),
    ):
        with pytest.raises(ValueError, match=message):
            ContextExtensionParams.model_validate({"target_length": 64, **values})
    assert params(method="lm-infinite").global_branch == 100
