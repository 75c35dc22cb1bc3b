"""Families outside the table: their rows are derived from the module tree of the stock class, built without weights.

Only what the tree settles becomes a role: an unambiguous name in the usual place, of the shape that the config implies,
alike in all layers. Fused projections and experts stay without a role, because the tree does not tell how they are laid
out, and asking for them is refused. Their tensors are still expected in the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regraft.core.architectures.family import Family, Part
from regraft.core.architectures.layout import bias_name
from regraft.core.errors import InputError, Unsupported

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Shapes = dict[str, tuple[int, ...]]

_ATTENTION = r"(self_attn|attn|attention|self_attention)\."
_MLP = r"((mlp|feed_forward|ffn)\.)?"
_PATTERNS = {
    "q_proj": _ATTENTION + "(q_proj|query|wq)",
    "k_proj": _ATTENTION + "(k_proj|key|wk)",
    "v_proj": _ATTENTION + "(v_proj|value|wv)",
    "o_proj": _ATTENTION + "(o_proj|out_proj|dense|c_proj|wo)",
    "q_norm": _ATTENTION + "(q_norm|q_layernorm)",
    "k_norm": _ATTENTION + "(k_norm|k_layernorm)",
    "gate_proj": _MLP + "gate_proj",
    "up_proj": _MLP + "(up_proj|c_fc|fc1|fc_in|dense_h_to_4h)",
    "down_proj": _MLP + "(down_proj|c_proj|fc2|fc_out|dense_4h_to_h)",
}
_NORM_SETS: Sequence[Mapping[str, str]] = (
    {"input_layernorm": "input_norm"},
    {"ln_1": "input_norm"},
    {"ln_1": "input_norm", "ln_2": "mlp_norm"},
    {"input_layernorm": "input_norm", "post_attention_layernorm": "mlp_norm"},
    {"post_attention_layernorm": "attention_output_norm", "post_feedforward_layernorm": "mlp_output_norm"},
    {
        "input_layernorm": "input_norm",
        "post_attention_layernorm": "attention_output_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_output_norm",
    },
)
"""What the norms of a layer do, by the whole set of their names: `post_attention_layernorm` alone tells nothing."""

_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_NOT_FOR_META = ("model_type", "auto_map", "quantization_config", "attn_implementation", "_attn_implementation")


@dataclass(frozen=True)
class _Leaf:
    """A module with a weight of its own: path, shapes, and whether it is stored transposed."""

    path: str
    shape: tuple[int, ...]
    bias: bool
    transposed: bool

    @property
    def rows(self) -> int:
        return self.shape[1 if self.transposed else 0]

    @property
    def columns(self) -> int | None:
        return None if len(self.shape) == 1 else self.shape[0 if self.transposed else 1]


def derive(config: Mapping[str, Any], alternatives: Sequence[str] = ()) -> tuple[Family, Shapes]:
    """A family row for the model of this config.json, and shapes of the tensors that have no role.

    Args:
        config: config.json.
        alternatives: names of known families to suggest if transformers does not know this one either.

    Raises:
        Unsupported: transformers has no causal language model of that type, or its layers are not alike in their heads.
        InputError: the stock config class refuses the config.
    """
    model = _meta_model(config, alternatives)
    numbers = _numbers(model.config.get_text_config(), str(config["model_type"]))
    base = model.base_model_prefix
    tied = frozenset(getattr(model, "all_tied_weights_keys", None) or ())
    shapes = _stored_shapes(model, tied)
    known = {*shapes, *tied}
    parts = tuple(part for part in _parts(model, base, numbers) if known.issuperset(_names(part, base, numbers)))
    covered = {name for part in parts for name in _names(part, base, numbers)}
    covered |= {bias_name(name) for name in covered}
    extra = {name: shape for name, shape in shapes.items() if name not in covered}
    family = Family(
        model_type=str(config["model_type"]), parts=parts, base=base, settle=lambda _: numbers, norm_offset=None
    )
    return family, extra


def _meta_model(config: Mapping[str, Any], alternatives: Sequence[str]) -> PreTrainedModel:
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    model_type = config["model_type"]
    remedy = "use a model of a supported family, or describe this one in a plugin (regraft_architectures)"
    if model_type not in CONFIG_MAPPING:
        raise Unsupported(
            "neither regraft nor transformers knows this model family",
            where="config.json: model_type",
            expected=f"perhaps {' or '.join(alternatives)}" if alternatives else None,
            found=model_type,
            remedy=remedy,
        )
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unsupported(
            "transformers has no causal language model of this family",
            where="config.json: model_type",
            found=model_type,
            remedy=remedy,
        )
    keys = {key: value for key, value in config.items() if key not in _NOT_FOR_META}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys))
    except Exception as error:  # the stock classes raise whatever their arithmetic happens to hit
        raise InputError(
            f"transformers cannot build this model: {type(error).__name__}: {error}",
            where="config.json",
            remedy="correct config.json",
        ) from error


def _numbers(config: PretrainedConfig, model_type: str) -> dict[str, Any]:
    hidden, layers, heads, vocab = (_count(config, key, model_type) for key in _COUNTS)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or hidden // heads,
        "intermediate_size": getattr(config, "intermediate_size", None),
        "vocab_size": vocab,
        "tie_word_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
    }


def _count(config: PretrainedConfig, key: str, model_type: str) -> int:
    value = getattr(config, key, None)
    if isinstance(value, int):
        return value
    raise Unsupported(
        "the stock class gives no one number for it, so its layers cannot be described alike",
        where=f"config.json of {model_type}: {key}",
        expected="a whole number",
        found=repr(value),
        remedy="use a model of a supported family",
    )


def _stored_shapes(model: PreTrainedModel, tied: frozenset[str]) -> Shapes:
    """Names and shapes that `save_pretrained` writes."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def _parts(model: PreTrainedModel, base: str, numbers: Mapping[str, Any]) -> Iterator[Part]:
    top = {leaf.path: leaf for leaf in _leaves(model)}
    root = f"{base}." if base else ""
    if (embeddings := _path_of(model, model.get_input_embeddings())) in top and embeddings.startswith(root):
        yield _part(top[embeddings], embeddings.removeprefix(root), "embed_tokens")
    head = _path_of(model, model.get_output_embeddings())
    if head in top and not (numbers["tie_word_embeddings"] and top[head].bias):  # a bias has no tensor to stand beside
        yield _part(top[head], head, "lm_head", outside=True)
    finals = [name for name in _FINAL_NORMS if f"{root}{name}" in top]
    if len(finals) == 1:
        yield _part(top[f"{root}{finals[0]}"], finals[0], "final_norm")
    layers = _layers(model, root, numbers["num_hidden_layers"])
    if layers:
        path, stack = layers
        for role, leaf in _layer_roles(stack, numbers).items():
            yield _part(leaf, f"{path.removeprefix(root)}.{{layer}}.{leaf.path}", role)


def _part(leaf: _Leaf, path: str, role: str, *, outside: bool = False) -> Part:
    return Part(
        path=path,
        roles=((role, leaf.rows),),
        columns=leaf.columns,
        bias=leaf.bias,
        transposed=leaf.transposed,
        outside=outside,
    )


def _names(part: Part, base: str, numbers: Mapping[str, Any]) -> list[str]:
    """The part's weights in the stock class, in all layers."""
    root = f"{base}." if base and not part.outside else ""
    layers = range(numbers["num_hidden_layers"]) if part.per_layer else (0,)
    return [f"{root}{part.path.format(layer=layer)}.weight" for layer in layers]


def _path_of(model: PreTrainedModel, module: torch.nn.Module | None) -> str:
    return next((name for name, each in model.named_modules() if each is module), "")


def _layers(model: PreTrainedModel, root: str, count: int) -> tuple[str, list[torch.nn.Module]] | None:
    """The outermost list of as many modules as the model has layers."""
    from torch import nn

    lists = [
        (path, list(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and path.startswith(root)
    ]
    return min(lists, key=lambda item: item[0].count("."), default=None)


def _leaves(module: torch.nn.Module) -> Iterator[_Leaf]:
    for path, each in module.named_modules():
        own = dict(each.named_parameters(recurse=False))
        weight, bias = own.get("weight"), own.get("bias")
        if weight is not None and set(own) <= {"weight", "bias"} and weight.ndim in (1, 2):
            yield _Leaf(path, tuple(weight.shape), bias is not None, type(each).__name__ == "Conv1D")


def _layer_roles(stack: Sequence[torch.nn.Module], numbers: Mapping[str, Any]) -> dict[str, _Leaf]:
    layers = [frozenset(_leaves(layer)) for layer in stack]
    alike = frozenset.intersection(*layers)
    found: dict[str, _Leaf] = {}
    for role, pattern in _PATTERNS.items():
        everywhere = {leaf for leaves in layers for leaf in leaves if re.fullmatch(pattern, leaf.path)}
        if len(everywhere) == 1 and everywhere <= alike and _fits(role, next(iter(everywhere)), numbers):
            found[role] = next(iter(everywhere))
    norms = {leaf.path: leaf for leaf in alike if leaf.shape == (numbers["hidden_size"],) and "." not in leaf.path}
    for names in _NORM_SETS:
        if set(names) == set(norms):
            found |= {role: norms[name] for name, role in names.items()}
    return found


def _fits(role: str, leaf: _Leaf, numbers: Mapping[str, Any]) -> bool:
    """Whether the shape is what the role must have; other shapes mean that the name means something else."""
    hidden, head_dim = numbers["hidden_size"], numbers["head_dim"]
    queries, keys = numbers["num_attention_heads"] * head_dim, numbers["num_key_value_heads"] * head_dim
    inner = numbers["intermediate_size"] or leaf.rows
    shapes: dict[str, tuple[tuple[int, int | None], ...]] = {
        "q_proj": ((queries, hidden),),
        "k_proj": ((keys, hidden),),
        "v_proj": ((keys, hidden),),
        "o_proj": ((hidden, queries),),
        "q_norm": ((head_dim, None), (queries, None)),
        "k_norm": ((head_dim, None), (keys, None)),
        "gate_proj": ((inner, hidden),),
        "up_proj": ((inner, hidden),),
        "down_proj": ((hidden, numbers["intermediate_size"] or leaf.columns),),
    }
    return (leaf.rows, leaf.columns) in shapes[role]
