"""LM-Infinite: local and global branch as code inside the checkpoint (Han et al., arXiv 2308.16137, section 3).

    keep(p, k) = k <= p and (p - k < local_branch or k < global_branch)
    distance(p, k) = p - k if p - k < local_branch, else limit_distance

The second line is reached by first tokens alone. With queries and keys that are rotated already, the branch of the
first tokens is ordinary attention of R(limit - p) q against R(-k) k, so both branches are ordinary and merge by the
logarithms of the sums of their softmax. Deviations from the reference repository (Glaciohound/LM-Infinite): padding is
masked, heads may share keys, keys that nobody can see any more leave the cache, and tokens come one by one or many at
a time. Its `top_k_attention`, which brings middle tokens back in some layers, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.portable_code import CodePatch, code_patch, portable_code, read_template, refuse_other_code
from regraft.plugins.context_extension.families import RotaryFamily, windows_of
from regraft.plugins.context_extension.rope import Rope

if TYPE_CHECKING:
    from regraft.plugins.context_extension.params import ContextExtensionParams

MODULE = "modeling_lm_infinite"
CLASS = "LmInfiniteForCausalLM"
_NOTHING_PASSED_ON = frozenset({"stablelm"})
"""Families whose classes do not hand on to attention what their model is given."""
_START = "start from another checkpoint"


def check_lm_infinite(
    checkpoint: Checkpoint, family: RotaryFamily, text: Mapping[str, Any], rope: Rope, params: ContextExtensionParams
) -> None:
    """Refuse what the code cannot express.

    Raises:
        Unsupported: with what stands in the way.
    """
    refuse_other_code(checkpoint)
    model_type = checkpoint.config.get("model_type")
    if family.attention != "sdpa" or family.local_key or model_type in _NOTHING_PASSED_ON:
        raise Unsupported(
            "the attention of this family cannot be replaced",
            where="config.json: model_type",
            expected="a class that hands on to transformers' attention interface what it is given, without a soft cap, "
            "with one set of rotary parameters",
            found=model_type,
            remedy="use another method, such as yarn",
        )
    architectures = text.get("architectures") or [family.stock_class]
    if architectures != [family.stock_class]:
        raise Unsupported(
            "LM-Infinite is written for the causal language model alone",
            where="config.json: architectures",
            expected=family.stock_class,
            found=", ".join(map(str, architectures)),
            remedy=_START,
        )
    if rope.kind not in ("default", "linear", "llama3", "yarn"):
        raise Unsupported(
            "rotary angles that depend on the length cannot be turned back",
            where="config.json: rope_parameters",
            expected="rope_type default, linear, llama3 or yarn",
            found=f"rope_type {rope.kind}",
            remedy=_START,
        )
    if windows_of(family, text, params.target_length) != "none":
        raise Unsupported(
            "layers with a sliding window drop the first tokens, which LM-Infinite keeps",
            where="config.json: sliding_window",
            expected="null",
            found=text.get("sliding_window", family.window),
            remedy="set sliding_window to null in config.json if the model may look back further",
        )


def branches(params: ContextExtensionParams, original: int) -> tuple[int, int, int]:
    """Local branch, global branch and distance limit in tokens, for a model trained on `original`.

    Raises:
        Unsupported: they contradict the window.
    """
    local = params.local_branch or original
    limit = params.limit_distance or local
    for name, value in (("local_branch", local), ("limit_distance", limit)):
        if value > original:
            raise Unsupported(
                "the model has never seen tokens that far apart",
                where=name,
                expected=f"at most {original}, the length it was trained on",
                found=value,
                remedy="lower it, or leave it out",
            )
    return local, params.global_branch, limit


def lm_infinite_code(model_type: str, family: RotaryFamily, sizes: tuple[int, int, int]) -> CodePatch:
    """The modeling file, and the config keys that make transformers use it or fail.

    Args:
        model_type: a key of `FAMILIES`.
        family: its row.
        sizes: as `branches` gives them.
    """
    local, first, limit = sizes
    name = f"regraft_lm_infinite_{model_type}_{local}_{first}_{limit}"
    literals = {
        "local_branch": local,
        "global_branch": first,
        "limit_distance": limit,
        "name": name,
        "stock_class": family.stock_class,
        "renamed": dict(family.renamed) or None,
    }
    code = portable_code(read_template(__package__, f"{MODULE}.py.template"), literals)
    return code_patch(MODULE, CLASS, code, attn_implementation=name)
