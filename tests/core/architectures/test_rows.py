"""Which rows, columns and tensors a role is, against what the live model computes with them."""

from contextlib import contextmanager

import pytest

from tests.families import FAMILIES, VARIANTS, tiny

NAMES = (*FAMILIES, "gemma3", *VARIANTS)
GATED = ("gate_proj", "up_proj", "down_proj")
FUSED = ("phi3", "phi3-multi-head", "gpt2", "gpt_neox", "gpt_neox-unbiased", "falcon", "falcon-multi-query",
         "falcon-multi-head")  # fmt: skip


@contextmanager
def recorded(model, paths):
    """First argument and output of modules, by path, while the model runs."""
    seen = {}

    def hook(path):
        def keep(module, inputs, output):
            copy = tuple(each.clone() for each in output) if isinstance(output, tuple) else output.clone()
            seen[path] = (inputs[0].clone(), copy)  # clones, since falcon adds in place

        return keep

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention_states(model):
    """Queries, keys and values (1, heads, 1, head_dim) that reach the attention function, by layer.

    The model must be run on one token: position 0 is not rotated, and attention over one key returns its value.
    """
    import torch
    from transformers import AttentionInterface

    layers = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        layers.append((query, key, value))
        shared = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return shared.transpose(1, 2).contiguous(), None

    def falcon_attend(query, key, value, *args, **kwargs):
        layers.append((query, key, value))
        return value.expand_as(query).clone()

    AttentionInterface.register("regraft_test_states", attend)
    falcon = model.config.model_type == "falcon"
    with pytest.MonkeyPatch.context() as patch:
        if falcon:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", falcon_attend)
        else:
            for config in (model.config, model.config.get_text_config()):
                patch.setattr(config, "_attn_implementation_internal", "regraft_test_states")
        yield layers


def run(model):
    import torch

    with torch.inference_mode():
        return model(torch.tensor([[7]]), use_cache=False).logits


def projected(checkpoint, role, layer, inputs, expert=None):
    """What the role makes of `inputs`, computed from the tensors on disk."""
    slot = checkpoint.architecture.slot(role, layer, expert)
    output = inputs @ slot.read(checkpoint.tensors[slot.tensor]).T
    return output + slot.read_bias(checkpoint.tensors[slot.bias]) if slot.bias else output


def linear_slots(architecture):
    for layer in (None, *range(architecture.num_layers)):
        for role in architecture.roles(layer):
            sparse = layer is not None and "router" in architecture.roles(layer)
            if role.endswith(("_proj", "lm_head", "router")) and not (sparse and role in GATED):
                yield architecture.slot(role, layer), layer


@pytest.mark.parametrize("name", NAMES)
def test_every_projection_on_disk_computes_what_its_live_module_computes(saved, name):
    import torch

    checkpoint = saved(name)
    slots = list(linear_slots(checkpoint.architecture))
    with recorded(checkpoint.model, {slot.module for slot, _ in slots}) as seen:
        run(checkpoint.model)
    for slot, layer in slots:
        inputs, output = seen[slot.module]
        output = output[0] if slot.role == "router" else output  # logits, scores, choices
        wanted = projected(checkpoint, slot.role, layer, inputs)
        torch.testing.assert_close(
            output[..., slot.row_indices()], wanted, atol=1e-5, rtol=1e-5, msg=lambda text, slot=slot: f"{slot}: {text}"
        )
    assert {slot.role for slot, _ in slots} >= {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_where_head_rows_says(saved, name):
    import torch

    checkpoint = saved(name)
    architecture, model = checkpoint.architecture, checkpoint.model
    modules = [architecture.slot("q_proj", layer).module for layer in range(architecture.num_layers)]
    with attention_states(model) as states, recorded(model, modules) as seen:
        run(model)
    assert len(states) == architecture.num_layers
    for layer, captured in enumerate(states):
        inputs = seen[modules[layer]][0][0, 0]
        for role, state in zip(("q_proj", "k_proj", "v_proj"), captured, strict=True):
            heads = architecture.num_heads if role == "q_proj" else architecture.num_kv_heads
            found = state[0, :: state.shape[1] // heads, 0]
            slot = architecture.slot(role, layer)
            weight, bias = checkpoint.tensors[slot.tensor], checkpoint.tensors.get(slot.bias)
            rows = [architecture.head_rows(role, layer, head) for head in range(heads)]
            weights = [(weight[:, run].T if slot.transposed else weight[run]) for run in rows]
            wanted = torch.stack([each @ inputs for each in weights])
            if bias is not None:
                wanted = wanted + torch.stack([bias[run] for run in rows])
            wanted = _normed(checkpoint, role, layer, wanted)
            torch.testing.assert_close(
                found, wanted, atol=1e-5, rtol=1e-5, msg=lambda text, role=role: f"{role}: {text}"
            )


def _normed(checkpoint, role, layer, heads):
    """`heads` (heads, head_dim) through the live norm of queries or keys, if there is one."""
    architecture = checkpoint.architecture
    if architecture.qk_norm is None or role == "v_proj":
        return heads
    norm = checkpoint.model.get_submodule(architecture.slot(f"{role[0]}_norm", layer).module)
    return norm(heads) if architecture.qk_norm == "head" else norm(heads.flatten()).view_as(heads)


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_the_output_projection_belong_to_the_heads(saved, name):
    import torch

    checkpoint = saved(name)
    architecture = checkpoint.architecture
    path = architecture.slot("o_proj", 0).module
    with attention_states(checkpoint.model) as states, recorded(checkpoint.model, [path]) as seen:
        run(checkpoint.model)
    values = states[0][2]
    values = values[0, :: values.shape[1] // architecture.num_kv_heads, 0]
    for head in range(architecture.num_heads):
        columns = seen[path][0][0, 0, architecture.head_columns(head)]
        assert torch.equal(columns, values[architecture.kv_head_of(head)])
    assert architecture.slot("o_proj", 0).num_columns == architecture.num_heads * architecture.head_dim


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("role", ["q_proj", "k_proj", "v_proj"])
def test_zeroing_the_rows_of_a_head_silences_that_head_alone(name, role, saved):
    import torch

    model = tiny(name)
    architecture = saved(name).architecture
    which = ("q_proj", "k_proj", "v_proj").index(role)
    heads = architecture.num_heads if role == "q_proj" else architecture.num_kv_heads
    with attention_states(model) as before:
        run(model)
    slot, victim = architecture.slot(role, 0), heads - 1
    module, rows = model.get_submodule(slot.module), architecture.head_rows(role, 0, victim)
    module.weight[(slice(None), rows) if slot.transposed else rows] = 0
    if module.bias is not None:
        module.bias[rows] = 0
    with attention_states(model) as after:
        run(model)
    for kind in range(3):
        old, new = before[0][kind][0, :, 0], after[0][kind][0, :, 0]
        group = old.shape[0] // heads
        expected = old.clone()
        if kind == which:
            expected[victim * group : (victim + 1) * group] = 0
        assert torch.equal(new, expected)
    assert before[0][which].abs().min() > 0


@pytest.mark.parametrize("name", ["phi3", "glm4", "llama-biased", "gemma2", "granite-biased", "smollm3"])
def test_gate_and_up_are_not_confused(saved, name):
    import torch
    from transformers.activations import ACT2FN

    checkpoint = saved(name)
    architecture, config = checkpoint.architecture, checkpoint.model.config
    up, down = architecture.slot("up_proj", 1).module, architecture.slot("down_proj", 1).module
    with recorded(checkpoint.model, [up, down]) as seen:
        run(checkpoint.model)
    inputs = seen[up][0]
    gate = ACT2FN[getattr(config, "hidden_act", None) or config.hidden_activation](
        projected(checkpoint, "gate_proj", 1, inputs)
    )
    wanted = gate * projected(checkpoint, "up_proj", 1, inputs)
    torch.testing.assert_close(seen[down][0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_norms_stand_where_their_roles_say(saved, name):
    import torch

    checkpoint = saved(name)
    architecture = checkpoint.architecture
    for layer in range(architecture.num_layers):
        roles = architecture.roles(layer)
        first = "router" if "router" in roles else "up_proj"
        kept = ["q_proj", "o_proj", first, *(role for role in roles if role.endswith("_norm"))]
        paths = {role: architecture.slot(role, layer).module for role in kept}
        mlp = paths[first].rpartition(".")[0]
        with recorded(checkpoint.model, {*paths.values(), mlp}) as seen:
            run(checkpoint.model)
        fed = {role: seen[path][0].flatten() for role, path in paths.items()}
        made = {role: seen[path][1].flatten() for role, path in paths.items() if role != "router"}
        mlp_made = seen[mlp][1]
        made["mlp"] = (mlp_made[0] if isinstance(mlp_made, tuple) else mlp_made).flatten()
        if "input_norm" in roles:
            assert torch.equal(made["input_norm"], fed["q_proj"])
        if "mlp_norm" in roles:
            assert torch.equal(made["mlp_norm"], fed[first])
        elif "input_norm" in roles:
            assert torch.equal(made["input_norm"], fed[first])
        if "attention_output_norm" in roles:
            assert torch.equal(fed["attention_output_norm"], made["o_proj"])
        if "mlp_output_norm" in roles:
            assert torch.equal(fed["mlp_output_norm"], made["mlp"])
        assert {"input_norm", "attention_output_norm"} & set(roles)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "llama", "gpt2", "olmo2"])
def test_the_offset_of_norms_is_what_the_live_norm_adds(saved, name):
    import torch

    checkpoint = saved(name)
    slot = checkpoint.architecture.slot("final_norm")
    norm = checkpoint.model.get_submodule(slot.module)
    with recorded(checkpoint.model, [slot.module]) as seen:
        run(checkpoint.model)
    inputs = seen[slot.module][0][0, 0]
    centred = inputs - inputs.mean() if slot.bias else inputs
    normed = centred / (centred.pow(2).mean() + 1e-6).sqrt()
    weight = slot.read(checkpoint.tensors[slot.tensor]) + checkpoint.architecture.norm_offset
    wanted = normed * weight + (checkpoint.tensors[slot.bias] if slot.bias else 0)
    torch.testing.assert_close(norm(inputs), wanted, atol=1e-4, rtol=1e-4)
