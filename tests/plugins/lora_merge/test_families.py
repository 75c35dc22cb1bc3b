"""Every family against `peft`'s own merge: the same bits where peft rounds once, one rounding apart elsewhere."""

import pytest
import torch

from regraft.core.sources.folder import open_folder
from tests.families import FAMILIES, OUTSIDE_TABLE, save_tiny
from tests.plugins.lora_merge.adapters import (
    make_adapter,
    merged_by_peft,
    merged_by_us,
    roundings_apart,
    tensors_of,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MIXTURES = ("mixtral", "qwen3_moe")
FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "gpt_neox": FUSED, "falcon": FUSED}


@pytest.fixture(scope="module", params=DTYPES, ids=["bf16", "fp16", "fp32"])
def dtype(request):
    return request.param


def changed_names(base, ours):
    before = tensors_of(open_folder(base, label="base"))
    return {name for name in ours if name not in before or not torch.equal(ours[name], before[name])}


@pytest.mark.parametrize("family", [name for name in (*FAMILIES, OUTSIDE_TABLE[0]) if name not in MIXTURES])
def test_every_projection_of_every_family(family, dtype, tmp_path):
    base = save_tiny(family, tmp_path / "base", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=TARGETS.get(family, "all-linear"))
    ours, theirs = tensors_of(merged_by_us(base, adapter)), merged_by_peft(base, adapter)
    assert set(ours) == set(theirs)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert len(changed_names(base, ours)) >= 8


@pytest.mark.parametrize("family", MIXTURES)
def test_experts(family, dtype, tmp_path):
    """Stacked factors, as peft makes them for transformers 5, on a checkpoint that holds the experts one by one."""
    base = save_tiny(family, tmp_path / "base", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    ours, theirs = tensors_of(merged_by_us(base, adapter)), merged_by_peft(base, adapter)
    assert sum(".experts." in name for name in changed_names(base, ours)) == sum(".experts." in name for name in ours)
    assert roundings_apart(ours, theirs) <= (0.0 if dtype == torch.float32 else 1.0)
