"""Pruned models: the oracles of Wanda, tasks that share a mask, MLPs switched off; all other bytes kept."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from regraft.core.architectures import architecture_of
from regraft.core.data.examples import Example, ints
from regraft.core.data.rows import Place
from regraft.core.patch import overlay
from regraft.core.patch_folder import load_patch, save_patch
from regraft.core.sources.folder import open_folder
from regraft.core.sparse_operations import Sparsity, pruned
from regraft.core.training.model import materialise_model
from regraft.core.training.modules import role_module
from regraft.core.transformation import Run
from regraft.plugins.prune import Prune
from regraft.plugins.prune.calibrate import MeanSquare, measure
from regraft.plugins.prune.params import PruneParams
from regraft.plugins.prune.places import MLP, places_of
from tests.checkpoints import bits
from tests.materialise import materialise

ONE = ["the quick brown fox", "jumps over", "a lazy dog and sleeps", "0123456789", "What is it?", "(none)"]
OTHER = ["{'a': [1, 2]}", "x = y + 2 * z", "def f(x): return x", "#!/bin/sh"]
DENSE = [
    "llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2", "glm4", "cohere2", "falcon",
    "falcon-multi-query", "starcoder2",
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """Called with texts, a file of them, one a line."""

    def write(name, texts):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(texts))
        return {"source": str(path), "text_unit": "line"}

    return write


def params(**keys):
    return PruneParams.model_validate_json(json.dumps(keys, default=str), strict=True)


def prune(folder, **keys):
    """Check, plan and apply; the patch keeps the plan's word. Gives the base, the patch and the result."""
    checkpoint, given, step = open_folder(folder, label="base"), params(**keys), Prune()
    step.check(checkpoint, given)
    outline = step.plan(checkpoint, given)
    patch = step.apply(checkpoint, given, Run("prune"))
    # what was measured and counted is in the notes of the run, not of the plan
    assert replace(outline, notes=()).deviations(patch) == []
    return checkpoint, patch, overlay(checkpoint, patch, by="prune")


def matrices(checkpoint, result, **keys):
    """(matrix, old weights, new weights) of every place."""
    for matrix in places_of(checkpoint, params(score="magnitude", sparsity=0.5, **keys)).matrices:
        name = matrix.slot.tensor
        yield matrix, matrix.slot.read(checkpoint.load(name)), matrix.slot.read(result.load(name))


def examples(texts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Example(
            ids := ints(torch.randint(3, 99, (len(text),), generator=generator).tolist()), ids, Place("x", 1, "row")
        )
        for text in texts
    ]


def one_shot(folder, model, texts):
    """sqrt(E x²) of every projection's input from its activations on single sequences, kept and put together."""
    checkpoint = open_folder(folder, label="base")
    architecture = architecture_of(checkpoint.config, checkpoint.specs)
    kept = {}
    for matrix in places_of(checkpoint, params(score="magnitude", sparsity=0.5)).matrices:
        module = role_module(model, architecture, matrix.role, matrix.layer)
        rows = kept.setdefault(matrix.slot.tensor, [])
        if not rows:
            module.register_forward_pre_hook(lambda module, inputs, rows=rows: rows.append(inputs[0].flatten(0, -2)))
            rows.append(torch.empty(0, matrix.shape[1]))
    with torch.no_grad():
        for one in texts:
            model(torch.tensor([list(one.ids)]))
    return {name: torch.cat(rows).double().square().mean(0).sqrt() for name, rows in kept.items()}


@pytest.mark.parametrize("family", DENSE)
def test_norms_in_padded_batches_are_those_of_all_tokens_at_once(family, tiny_folder):
    folder = tiny_folder(family)
    checkpoint = open_folder(folder, label="base")
    places = places_of(checkpoint, params(score="magnitude", sparsity=0.5))
    texts = examples(ONE)
    model = materialise_model(checkpoint)
    found = measure(model, places.architecture, places.matrices, texts, batch_size=4)
    expected = one_shot(folder, materialise_model(checkpoint), texts)
    assert set(found) == set(expected) == {matrix.slot.tensor for matrix in places.matrices}
    for name, norm in found.items():
        torch.testing.assert_close(norm.double(), expected[name], rtol=2e-5, atol=1e-7)


def test_an_online_mean_is_that_of_all_rows():
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 1e3, 1e6])
    online = MeanSquare(torch.zeros(4, dtype=torch.float64))
    for part in rows.split([1, 20, 3, 26]):
        online.add(part)
    torch.testing.assert_close(online.mean, rows.double().square().mean(0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("family", DENSE)
def test_every_output_row_loses_exactly_its_share_by_wanda(family, tiny_folder, data):
    """And the lowest scores of it; tensors that are not pruned, and biases, are not even read."""
    checkpoint, patch, result = prune(tiny_folder(family), sparsity=0.3, data=data("one", ONE), batch_size=1)
    norms = {name: next(iter(edit.operation.norms)).load() for name, edit in patch.edits.items()}
    for matrix, old, new in matrices(checkpoint, result):
        gone = (new == 0) & (old != 0)
        assert (gone.sum(1) == int(old.shape[1] * 0.3)).all(), matrix.name
        assert torch.equal(gone, pruned(old, Sparsity(0.3), [norms[matrix.slot.tensor]]))
        assert torch.equal(new, old.masked_fill(gone, 0))
    for name, tensor in checkpoint.tensors.items():
        assert name in patch.edits or result.tensors[name] is tensor
    assert patch.metrics["sparsity"] == pytest.approx(0.3, abs=0.02)
    figures = json.loads(patch.reports["prune.json"].read())
    assert sum(one["pruned"] for one in figures.values()) == patch.metrics["pruned"]
    assert patch.reports["lost.png"].read().startswith(b"\x89PNG")


def test_the_masked_model_computes_what_masking_computes(tiny_folder, data, tmp_path):
    """The written model, and the base whose inputs meet masked weights by a hook."""
    checkpoint, patch, result = prune(tiny_folder("llama"), sparsity=0.5, data=data("one", ONE))
    masked = materialise_model(checkpoint)
    norms = {name: edit.operation.norms[0].load() for name, edit in patch.edits.items()}
    for matrix in places_of(checkpoint, params(score="magnitude", sparsity=0.5)).matrices:
        module = role_module(masked, architecture_of(checkpoint.config), matrix.role, matrix.layer)
        keep = ~pruned(module.weight, Sparsity(0.5), [norms[matrix.slot.tensor]])

        def forward(x, module=module, keep=keep):
            return torch.nn.functional.linear(x, module.weight * keep, module.bias)

        module.forward = forward
    ids = torch.randint(3, 99, (2, 20), generator=torch.Generator().manual_seed(1))
    written = AutoModelForCausalLM.from_pretrained(materialise(result, tmp_path / "out"), dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.equal(written(ids).logits, masked(ids).logits)
        assert not torch.allclose(written(ids).logits, materialise_model(checkpoint)(ids).logits, atol=0.1)


def test_the_order_of_samples_does_not_matter(tiny_folder, data):
    masks = []
    for name, texts in (("forth", ONE), ("back", ONE[::-1])):
        _, patch, _ = prune(tiny_folder("qwen3"), sparsity=0.5, data=data(name, texts), batch_size=1, masks=True)
        masks.append(load(patch.reports["masks.safetensors"].read()))
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_tasks_share_what_all_of_them_prune_or_the_lowest_by_their_mean(tiny_folder, data):
    folder, tasks = tiny_folder("llama"), {"text": data("one", ONE), "code": data("other", OTHER)}
    alone = [prune(folder, sparsity=0.5, data=one, batch_size=1) for one in tasks.values()]
    checkpoint, patch, result = prune(folder, sparsity=0.5, tasks=tasks, batch_size=1)
    shared = 0
    for name in patch.edits:
        each = [(above.load(name) == 0) for _, _, above in alone]
        both = result.load(name) == 0
        assert torch.equal(both, each[0] & each[1])
        shared += int(both.sum())
    assert patch.metrics["pruned"] == shared
    union = 2 * alone[0][1].metrics["pruned"] - shared
    assert patch.metrics["iou"]["text code"] == pytest.approx(shared / union, abs=0.02)
    assert 0.3 < patch.metrics["iou"]["text code"] < 1
    assert patch.reports["iou.png"].read().startswith(b"\x89PNG")
    assert set(patch.metrics["data"]) == {"text", "code"}
    _, mean, above = prune(folder, sparsity=0.5, tasks=tasks, combine="mean", batch_size=1)
    assert mean.metrics["pruned"] == alone[0][1].metrics["pruned"]
    norms = [{name: edit.operation.norms[0].load() for name, edit in one.edits.items()} for _, one, _ in alone]
    for matrix, old, new in matrices(checkpoint, above):
        tensor = matrix.slot.tensor
        expected = pruned(old, Sparsity(0.5), [(norms[0][tensor].double() + norms[1][tensor]).float() / 2])
        assert torch.equal(new == 0, expected | (old == 0))


def test_two_of_four_and_the_bits_of_the_mask(tiny_folder, data):
    checkpoint, patch, result = prune(tiny_folder("phi3"), pattern="2:4", data=data("one", ONE), masks=True)
    packed = load(patch.reports["masks.safetensors"].read())
    for matrix, _, new in matrices(checkpoint, result):
        assert ((new.view(len(new), -1, 4) == 0).sum(-1) == 2).all(), matrix.name
    assert set(packed) == set(patch.edits)
    for name, mask in packed.items():
        unpacked = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1).bool()
        assert torch.equal(unpacked, result.load(name) == 0)
        assert mask.shape == (result.specs[name].shape[0], result.specs[name].shape[1] // 8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"])
def test_magnitude_prunes_the_smallest_of_a_whole_matrix(family, tiny_folder):
    checkpoint, patch, result = prune(tiny_folder(family), score="magnitude", sparsity=0.4, layers=[1])
    edited = set()
    for matrix, old, new in matrices(checkpoint, result, layers=[1]):
        gone = (new == 0) & (old != 0)
        assert gone.sum() == int(old.numel() * 0.4), matrix.name
        assert old[gone].abs().max() <= new[new != 0].abs().min()
        assert torch.equal(new, old.masked_fill(gone, 0))
        edited.add(matrix.slot.tensor)
    assert set(patch.edits) == edited
    assert all(".1." in name for name in edited)


def test_roles_of_a_fused_tensor_leave_the_others_alone(tiny_folder, data):
    checkpoint, patch, result = prune(tiny_folder("gpt_neox"), sparsity=0.5, roles=["k_proj"], data=data("one", ONE))
    architecture = architecture_of(checkpoint.config, checkpoint.specs)
    for layer in (0, 1):
        slot = architecture.slot("k_proj", layer)
        old, new = checkpoint.load(slot.tensor), result.load(slot.tensor)
        assert ((slot.read(new) == 0).sum(1) == 32).all()
        assert bits(slot.write(new, slot.read(old))) == bits(old)
    assert len(patch.edits) == 2


@pytest.mark.parametrize("family", ["llama-biased", "gemma2", "gpt2", "mixtral", "falcon", "olmo2"])
def test_a_skipped_mlp_adds_nothing(family, tiny_folder, tmp_path):
    """As if the module gave zeros."""
    checkpoint, patch, result = prune(tiny_folder(family), skip_ffn={"every": 2, "start": 1})
    assert patch.metrics == {"skipped_ffn": [1]}
    assert "neither smaller nor faster" in patch.notes[0]
    model = AutoModelForCausalLM.from_pretrained(materialise(result, tmp_path / "out"), dtype=torch.float32).eval()
    hooked = materialise_model(checkpoint)
    layer = [module for name, module in hooked.named_modules() if name.endswith((".1.mlp", ".1.block_sparse_moe"))]
    assert len(layer) == 1
    layer[0].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    ids = torch.randint(3, 99, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, hooked(ids).logits, rtol=0, atol=1e-6)
    names = re.compile(r"\.1\.(mlp|block_sparse_moe)\.(.*w2|down_proj|c_proj|dense_4h_to_h)\.")
    assert set(patch.edits) == {name for name in checkpoint.specs if names.search(name)}


def test_inputs_are_measured_behind_the_skipped_mlps(tiny_folder, data):
    folder, one = tiny_folder("llama"), data("one", ONE)
    _, skipped, _ = prune(folder, skip_ffn={})
    below = overlay(open_folder(folder, label="base"), skipped, by="skip")
    expected = Prune().apply(below, params(sparsity=0.5, data=one), Run("prune"))
    _, both, result = prune(folder, sparsity=0.5, data=one, skip_ffn={})
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(both.edits[name].operation.norms[0].load(), expected.edits[name].operation.norms[0].load())
    assert not any(role in key for key in both.edits for role in MLP if ".0." in key and role != "down_proj")
    assert not result.load("model.layers.0.mlp.down_proj.weight").any()


def test_a_saved_patch_holds_the_norms_and_gives_the_same_bits(tiny_folder, data, tmp_path):
    checkpoint, patch, result = prune(tiny_folder("gpt2"), sparsity=0.5, data=data("one", ONE))
    save_patch(patch, checkpoint, result, tmp_path / "prune.regraft")
    stored = (tmp_path / "prune.regraft/tensors.safetensors").stat().st_size
    assert stored < 0.05 * sum(checkpoint.specs[name].nbytes for name in patch.edits)
    again = overlay(checkpoint, load_patch(tmp_path / "prune.regraft")[0], by="prune")
    assert all(bits(again.load(name)) == bits(result.load(name)) for name in patch.edits)
