"""Hyperparameters and rope scalings out of metadata, and the refusal of what no stock class expresses."""

from __future__ import annotations

import math

import pytest
import torch

from regraft.core.errors import InputError
from regraft.core.gguf.metadata import shortest
from regraft.core.sources import open_checkpoint
from tests.core.gguf.test_models import IDS, rebuilt
from tests.core.gguf.writing import write_model
from tests.families import tiny


def opened(tmp_path, change=None, family="llama", **options):
    sizes = options.pop("sizes", {})
    return open_checkpoint(write_model(tmp_path / "model.gguf", tiny(family, **sizes), change=change, **options))


def refused(tmp_path, change=None, family="llama", **options):
    with pytest.raises(InputError) as caught:
        opened(tmp_path, change, family, **options)
    assert caught.value.remedy
    return caught.value


def frequencies(dim, theta, factor, low=1.0, high=4.0, context=8192):
    """The divisors of Llama 3.1, from transformers' own computation."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    config = LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, rope_parameters=scaling)
    plain = 1.0 / (theta ** (torch.arange(0, dim, 2).float() / dim))
    return plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]


def test_linear_scaling(tmp_path):
    def change(writer):
        import gguf

        writer.add_rope_freq_base(5e5)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    expected = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
    assert opened(tmp_path, change).config["rope_parameters"] == expected


def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(tmp_path):
    rope = opened(tmp_path, lambda writer: writer.add_rope_scaling_factor(2.0)).config["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def test_yarn_scaling_gives_the_same_logits(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
    model = tiny("qwen2", rope_parameters=rope)

    def change(writer):
        import gguf

        writer.add_rope_freq_base(1e6)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
        writer.add_rope_scaling_finetuned(True)

    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", model, change=change))
    assert checkpoint.config["rope_parameters"] == rope
    with torch.no_grad():
        assert torch.equal(rebuilt(checkpoint, tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("factor", "theta", "dim"), [(8.0, 5e5, 128), (32.0, 5e5, 64), (32.0, 10000.0, 16)])
def test_llama3_factors_become_llama3_scaling(factor, theta, dim, tmp_path):
    divisors = frequencies(dim, theta, factor)
    assert len({round(value, 4) for value in divisors.tolist()}) > 2
    rope = opened(
        tmp_path,
        lambda writer: writer.add_rope_freq_base(theta),
        sizes={"head_dim": dim},
        extra={"rope_freqs.weight": divisors},
    ).config["rope_parameters"]
    assert rope == {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_factors_of_one_are_no_scaling(tmp_path):
    rope = opened(tmp_path, extra={"rope_freqs.weight": torch.ones(8)}).config["rope_parameters"]
    assert rope == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "divisors", [torch.linspace(1, 8, 8), torch.ones(7), torch.zeros(8), torch.full((8,), math.nan)]
)
def test_other_factors_are_refused(divisors, tmp_path):
    error = refused(tmp_path, extra={"rope_freqs.weight": divisors})
    assert "rope_freqs.weight" in error.where


def test_longrope_of_phi3_gives_the_same_logits(tmp_path):
    short, long = [1.0, 1.05, 1.1, 1.3, 1.5, 2.0], [1.0, 1.5, 3.0, 8.0, 20.0, 41.0]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
    }
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=32)

    def change(writer):
        writer.add_rope_dimension_count(12)
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(4) / math.log(32)))

    extra = {"rope_factors_short.weight": torch.tensor(short), "rope_factors_long.weight": torch.tensor(long)}
    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", model, change=change, extra=extra))
    found = dict(checkpoint.config["rope_parameters"])
    assert found.pop("attention_factor") == pytest.approx(1.1832, abs=1e-4)
    assert found == rope
    assert checkpoint.config["original_max_position_embeddings"] == 32
    again = rebuilt(checkpoint, tmp_path)
    with torch.no_grad():
        for length in (20, 40):
            torch.testing.assert_close(again(IDS[:, :length]).logits, model(IDS[:, :length]).logits, rtol=0, atol=1e-5)


def test_gemma3_has_two_rotary_embeddings(tmp_path):
    def change(writer):
        import gguf

        writer.add_rope_freq_base(1e6)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    config = opened(tmp_path, change, "gemma3_text").config
    assert config["rope_parameters"] == {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert config["model_type"] == "gemma3_text"
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert config["query_pre_attn_scalar"] == 24


REFUSED = {
    "architecture": (lambda w: w.add_architecture_of("mamba"), "general.architecture", "mamba"),
    "split": (lambda w: w.add_uint16("split.count", 3), "split.count", "3 parts"),
    "adapter": (lambda w: w.add_type("adapter"), "general.type", "adapter"),
    "old quantisation": (lambda w: w.add_quantization_version(1), "general.quantization_version", "1"),
    "unknown hyperparameter": (lambda w: w.add_uint32("llama.mystery", 7), "llama.mystery", "7"),
    "experts": (lambda w: w.add_expert_count(8), "llama.expert_count", "8"),
    "logit scale": (lambda w: w.add_logit_scale(0.5), "llama.logit_scale", "0.5"),
    "bidirectional": (lambda w: w.add_causal_attention(False), "llama.attention.causal", "False"),
    "sliding window": (lambda w: w.add_sliding_window(16), "llama.attention.sliding_window", "16"),
    "partial rotation": (lambda w: w.add_rope_dimension_count(8), "model.gguf", "8"),
    "yarn attention factor": (
        lambda w: w.add_float32("llama.rope.scaling.yarn_attn_factor", 1.2),
        "yarn_attn_factor",
        "1.2",
    ),
    "yarn multiplier": (
        lambda w: w.add_float32("llama.rope.scaling.yarn_log_multiplier", 0.5),
        "yarn_log_multiplier",
        "0.5",
    ),
    "unknown rope": (lambda w: w.add_string("llama.rope.scaling.type", "su"), "rope.scaling.type", "su"),
    "wrong type": (lambda w: w.replace("llama.embedding_length", "64"), "llama.embedding_length", "64"),
    "missing size": (lambda w: w.replace("llama.block_count", None), "llama.block_count", None),
    "negative size": (lambda w: w.replace("llama.feed_forward_length", -96), "llama.feed_forward_length", "-96"),
    "no heads": (lambda w: w.replace("llama.attention.head_count", 0), "llama.attention.head_count", "0"),
    "odd groups": (
        lambda w: w.replace("llama.attention.head_count_kv", 3),
        "llama.attention.head_count_kv",
        "3 key-value",
    ),
    "a billion layers": (lambda w: w.replace("llama.block_count", 10**9), "llama.block_count", "1000000000"),
    "another size": (lambda w: w.replace("llama.feed_forward_length", 128), "blk.0.ffn_gate.weight", "[96, 64]"),
    "another vocabulary": (lambda w: w.replace("llama.vocab_size", 99), "llama.vocab_size", "99"),
    "layers that differ": (lambda w: w.replace("llama.attention.head_count_kv", [2, 1]), "head_count_kv", "[2, 1]"),
    "infinite epsilon": (lambda w: w.replace("llama.attention.layer_norm_rms_epsilon", math.inf), "rms_epsilon", "inf"),
    "number beyond 32 bits": (lambda w: w.replace("llama.rope.freq_base", 1e300), "rope.freq_base", "1e+300"),
    "bos outside": (lambda w: w.add_bos_token_id(128), "bos_token_id", "128"),
}


class Liar:
    """A writer whose metadata can be replaced after the fact."""

    def __init__(self, writer):
        self.writer = writer

    def __getattr__(self, name):
        return getattr(self.writer, name)

    def replace(self, key, value):
        import gguf

        self.writer.kv_data[0].pop(key, None)
        if value is not None:
            kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.INT64, float: gguf.GGUFValueType.FLOAT64}
            self.writer.add_key_value(key, value, kinds.get(type(value), gguf.GGUFValueType.ARRAY))

    def add_architecture_of(self, name):
        self.replace("general.architecture", name)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    change, where, found = REFUSED[name]
    error = refused(tmp_path, lambda writer: change(Liar(writer)))
    assert where in error.where
    assert found is None or found in error.found


def test_phi3_refuses_what_its_class_cannot_have(tmp_path):
    linear = refused(tmp_path, lambda writer: writer.add_rope_scaling_factor(2.0), "phi3")
    assert linear.found == "linear"
    lengths = [f"phi3.attention.{kind}_length" for kind in ("key", "value")]
    wide = refused(tmp_path, lambda writer: [Liar(writer).replace(length, 24) for length in lengths], "phi3")
    assert wide.found == "24"


def test_unsupported_architecture_lists_the_supported_ones(tmp_path):
    error = refused(tmp_path, lambda writer: Liar(writer).add_architecture_of("mamba"))
    assert error.expected == "one of llama, qwen2, qwen3, gemma2, gemma3, phi3"


def test_a_hyperparameter_given_layer_by_layer_may_be_uniform(tmp_path):
    def change(writer):
        Liar(writer).replace("llama.attention.head_count_kv", [2, 2])

    assert opened(tmp_path, change).config["num_key_value_heads"] == 2


def test_missing_tensor_is_named(tmp_path):
    error = refused(tmp_path, skip={"blk.1.attn_v.weight"})
    assert "blk.1.attn_v.weight" in error.where


def test_unknown_tensor_is_named(tmp_path):
    error = refused(tmp_path, extra={"blk.0.attn_sinks.weight": torch.ones(4)})
    assert "blk.0.attn_sinks.weight" in error.where


def test_biases_without_a_place_are_refused(tmp_path):
    biases = {
        f"blk.{layer}.attn_{letter}.bias": torch.ones(64 if letter == "q" else 32)
        for layer in (0, 1)
        for letter in "qkv"
    }
    error = refused(tmp_path, extra=biases)
    assert error.found == "attn_k, attn_q, attn_v"


@pytest.mark.parametrize("value", [1e-5, 1e-6, 0.1, 10000.0, 500000.0, 1.1832159, 3.0, 0.0, 8])
def test_shortest_decimal(value):
    single = float(torch.tensor(value, dtype=torch.float32))
    assert shortest(single) == value
    assert torch.tensor(shortest(single), dtype=torch.float32).item() == single


def test_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"\x93NUMPY" + bytes(100))
    with pytest.raises(InputError, match="not a GGUF file"):
        open_checkpoint(path)
    with pytest.raises(InputError, match="no such file"):
        open_checkpoint(tmp_path / "none.gguf")


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_largest_gemma_scales_queries_by_the_mean_head(family, layers, tmp_path):
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    sizes = {"num_hidden_layers": layers, "layer_types": kinds}
    assert opened(tmp_path, family=family, sizes=sizes).config["query_pre_attn_scalar"] == 64 // 4
