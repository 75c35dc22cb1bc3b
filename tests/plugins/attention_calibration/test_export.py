"""What a calibrated checkpoint computes: against the specification, and the same however a text is cut and batched."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.core.portable_code import prove
from regraft.kernels.calibrated_attention import reference
from regraft.kernels.calibrated_attention_chunked import Calibration
from regraft.plugins.attention_calibration.families import FAMILIES
from tests.checkpoints import read_all, same_bits
from tests.families import save_tiny
from tests.plugins.attention_calibration.support import EASY, calibrate, export, load, token_ids

HEADS = [[1, 0], [1, 3]]
"""In the layer that has full attention in every family."""

SCOPES = ("causal", "prompt")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def models(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("calibrated")
    heads = [[0, 1], *HEADS]
    return {scope: load(export(base, folder / scope, heads=heads, scope=scope, **EASY)) for scope in SCOPES}


def greedy(model: Any, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    return model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, **options)[:, -10:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calibrated_and_decodes_as_it_reads(family: str, tmp_path: Path) -> None:
    """With a dynamic and a static cache; eager as sdpa; and a head that is not chosen changes nothing."""
    base = save_tiny(family, tmp_path / "base")
    model, plain = load(export(base, tmp_path / "out", heads=HEADS, **EASY)), load(base, trust_remote_code=False)
    ids = token_ids(24)
    assert isinstance(model, type(plain))
    assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-2
    wanted = greedy(model, ids, use_cache=False)
    assert greedy(model, ids) == greedy(model, ids, cache_implementation="static") == wanted
    if family in ("llama", "gpt_neox"):
        eager = load(tmp_path / "out", attn_implementation="eager")
        assert torch.allclose(eager(ids).logits, model(ids).logits, atol=1e-4)
    for module in model.modules():
        if hasattr(module, "act_heads"):
            module.act_heads = ()
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("scope", SCOPES)
def test_attention_is_that_of_the_specification(base: Path, tmp_path: Path, scope: str) -> None:
    """Grouped heads, with the threshold of each mode: what enters o_proj, head by head."""
    plain = load(base, trust_remote_code=False)
    ids, seen, given = token_ids(40, batch=2), {}, {}
    for mode, tau in (("absolute", 0.06), ("relative", 2.0)):
        options = {"tau": tau, "tau_mode": mode, "min_queries": 2, "beta": 0.2, "scope": scope}
        model = load(export(base, tmp_path / mode, heads=HEADS, **options))
        for name, some in (("ours", model), ("plain", plain)):
            attention = some.model.layers[1].self_attn
            attention.o_proj.register_forward_pre_hook(lambda module, args, _name=name: seen.update({_name: args[0]}))
            attention.register_forward_pre_hook(
                lambda module, args, kwargs: given.update(kwargs, module=module), with_kwargs=True
            )
            some(ids)
        attention, states = given["module"], given["hidden_states"]
        query, key, value = (
            getattr(attention, f"{one}_proj")(states).view(2, 40, -1, 16).transpose(1, 2) for one in "qkv"
        )
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        query, key = apply_rotary_pos_emb(query, key, *given["position_embeddings"])
        wanted, _, sinks = reference(query, key, value, Calibration(0.2, tau, mode == "relative", scope == "causal", 2))
        ours, theirs = (seen[name].view(2, 40, 4, 16).transpose(1, 2) for name in ("ours", "plain"))
        assert sinks[:, [0, 3]].any()
        assert torch.allclose(ours[:, [0, 3]], wanted[:, [0, 3]], atol=1e-5)
        assert torch.equal(ours[:, [1, 2]], theirs[:, [1, 2]])


@pytest.mark.parametrize("scope", SCOPES)
def test_batches_and_padding_do_not_matter(models: dict[str, Any], scope: str) -> None:
    """Two texts as one batch, padded on the left or right; and generation from the padded batch."""
    model = models[scope]
    long, short = token_ids(30), token_ids(21, seed=5)
    alone = [model(long).logits, model(short).logits]
    for side in ("left", "right"):
        pad = torch.zeros(1, 9, dtype=torch.int64)
        row = torch.cat([pad, short] if side == "left" else [short, pad], 1)
        ids, mask = torch.cat([long, row]), torch.ones(2, 30, dtype=torch.int64)
        own = slice(9, 30) if side == "left" else slice(0, 21)
        mask[1] = 0
        mask[1, own] = 1
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        logits = model(ids, attention_mask=mask, **positions).logits
        assert torch.allclose(logits[:1], alone[0], atol=2e-5)
        assert torch.allclose(logits[1:, own], alone[1], atol=2e-5)
        if side == "left":
            together = greedy(model, ids, attention_mask=mask)
            assert together == greedy(model, long) + greedy(model, short)
            assert together == greedy(model, ids, attention_mask=mask, cache_implementation="static")


def test_the_causal_scope_is_the_same_in_pieces(models: dict[str, Any]) -> None:
    """Chunked prefill with either cache, beams, and a prefix whose cache several continuations share."""
    from transformers import DynamicCache, StaticCache

    model, ids = models["causal"], token_ids(40)
    whole = model(ids).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=48)):
        for start, stop in ((0, 17), (17, 30), (30, 31), (31, 40)):
            mask = torch.ones(1, stop, dtype=torch.int64)
            piece = model(ids[:, start:stop], past_key_values=cache, attention_mask=mask).logits
            assert torch.allclose(piece, whole[:, start:stop], atol=2e-5)
        cache.reset()
        again = model(ids[:, :17], past_key_values=cache, attention_mask=torch.ones(1, 17, dtype=torch.int64)).logits
        assert torch.allclose(again, whole[:, :17], atol=2e-5)
    assert greedy(model, ids, num_beams=3) == greedy(model, ids, num_beams=3, use_cache=False)
    assert greedy(model, ids, prefill_chunk_size=13) == greedy(model, ids)
    assert torch.allclose(model(ids[:, :20]).logits, whole[:, :20], atol=2e-5)


def test_the_prompt_scope_keeps_the_prompts_sinks(models: dict[str, Any]) -> None:
    """It looks at the whole prompt, so that a longer one changes earlier rows; decoding finds no new sinks."""
    from transformers import DynamicCache

    model, ids = models["prompt"], token_ids(40)
    assert (model(ids).logits[:, :20] - model(ids[:, :20]).logits).abs().max() > 1e-4
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    sinks = cache.layers[1].act_memory.sinks.clone()
    for token in range(3, 8):
        model(torch.tensor([[token]]), past_key_values=cache)
    after = cache.layers[1].act_memory.sinks
    assert sinks.any()
    assert after[..., :40].equal(sinks)
    assert not after[..., 40:].any()


def test_caches_that_cannot_be_followed_are_refused(models: dict[str, Any], base: Path) -> None:
    """One of another kind, one that was filled without calibration or was cut, and keys from nowhere."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class OtherLayer(DynamicLayer):
        pass

    model, plain, ids = models["causal"], load(base, trust_remote_code=False), token_ids(20)
    cache = DynamicCache(config=model.config)
    cache.layers = [OtherLayer() for _ in range(2)]
    with pytest.raises(ValueError, match="works with dynamic and static caches, and this one is a OtherLayer"):
        model(ids, past_key_values=cache)
    cache = DynamicCache(config=model.config)
    plain(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds 20 tokens, and calibrated attention has seen 0"):
        model(ids, past_key_values=cache)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot take tokens out of a cache"):
        cache.crop(-3)


def test_weights_stay_and_a_load_without_the_code_fails(base: Path, tmp_path: Path) -> None:
    """Byte-identical tensors; `act` in config.json; another process, without regraft, refuses or computes."""
    folder = export(base, tmp_path / "out", heads=HEADS, beta=0.25)
    assert same_bits(read_all(base), read_all(folder))
    config = json.loads((folder / "config.json").read_text())
    assert config["act"] == {
        "version": 1, "beta": 0.25, "tau": 0.1, "tau_mode": "absolute", "scope": "causal", "min_queries": 4,
        "spare_first": True, "heads": {"1": [0, 3]},
    }  # fmt: skip
    proof = prove(folder)
    assert proof.ok, proof.error
    assert "regraft_attention_calibration_llama_sdpa" in proof.report["untrusted"]


def test_a_block_that_is_not_understood_is_refused(base: Path, tmp_path: Path) -> None:
    """Whatever is missing, unknown or of another model; and the heads of the block are those that are calibrated."""
    folder = export(base, tmp_path / "out", heads=HEADS, **EASY)
    config = json.loads((folder / "config.json").read_text())

    def loaded(**act: Any) -> Any:
        block = {key: value for key, value in {**config["act"], **act}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps({**config, "act": block}))
        return load(folder)

    wrong: dict[str, Any] = {
        "heads": [None, [[1, 0]], {"1": 0}, {"1": []}, {"1": [4]}, {"1": [-1]}, {"1": [0, 0]}, {"1": [True]},
                  {"2": [0]}, {"01": [0]}, {"one": [0]}],
        "beta": [None, "0.4", 1.5, True, float("nan")], "tau": [None, 0, "0.1", float("inf")],
        "tau_mode": [None, "mean"], "scope": ["row"], "min_queries": [0, 4.0, True], "spare_first": [1], "more": [1],
    }  # fmt: skip
    for key, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"does not understand act\.{key}"):
                loaded(**{key: value})
    for version in (2, None):
        with pytest.raises(ValueError, match="no block of attention calibration"):
            loaded(version=version)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "act"}))
    with pytest.raises(ValueError, match="no block of attention calibration"):
        load(folder)
    ids = token_ids(24)
    both, plain = loaded()(ids).logits, load(base, trust_remote_code=False)(ids).logits
    one = loaded(heads={"1": [0]})(ids).logits
    assert torch.equal(loaded(heads={})(ids).logits, plain)
    assert min((one - plain).abs().max(), (both - one).abs().max()) > 1e-3


def test_a_copy_that_transformers_saves_still_fails_closed(models: dict[str, Any], tmp_path: Path) -> None:
    models["causal"].save_pretrained(tmp_path / "copy")
    again = load(tmp_path / "copy")
    ids = token_ids(30)
    assert torch.equal(again(ids).logits, models["causal"](ids).logits)
    with pytest.raises(ValueError, match="load the checkpoint with trust_remote_code=True"):
        load(tmp_path / "copy", trust_remote_code=False)(ids)  # a process that has not run the code fails to load it


def test_the_plan_tells_config_and_file(base: Path) -> None:
    patch = calibrate(base, heads=HEADS)
    assert not patch.edits
    assert set(patch.files) == {"modeling_attention_calibration.py"}
    assert set(patch.json) == {"config.json"}
    assert patch.metrics == {"heads": HEADS}
