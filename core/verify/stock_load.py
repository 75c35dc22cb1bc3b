"""Run as a script, without regraft: loads a checkpoint folder in stock transformers and prints what it found as JSON.

Usage: python -I stock_load.py FOLDER load|forward 0|1   (the last: whether the folder's own code may run)
"""

import json
import pathlib
import sys
import warnings
from typing import Any


def load(folder: str, trust: bool) -> tuple[Any, dict[str, Any]]:
    """The model, and the keys that its class misses, does not know, or finds in another shape."""
    options = {"trust_remote_code": True} if trust else {}
    kind = auto_class(folder)
    model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    return model, {
        key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def auto_class(folder: str) -> Any:
    """The auto class of the head that config.json names: a language model's, or a classifier's."""
    import transformers

    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    for name in config.get("architectures") or ():
        for head in ("ForTokenClassification", "ForSequenceClassification", "ForQuestionAnswering"):
            if name.endswith(head):
                return getattr(transformers, f"AutoModel{head}")
    return transformers.AutoModelForCausalLM


def forward(model: Any) -> dict[str, Any]:
    """One batch of two rows of 16 ids: are the logits finite, and is a row the same alone as in the batch?

    On CPUs with AVX512-BF16, bitsandbytes (0.50) repacks 4-bit weights for a product of its own, which fails where they
    have no multiple of 32 rows or rows of no whole number of blocks; switched off, the weights are dequantised as
    everywhere else. That is about the machine that verifies, not about the checkpoint.
    """
    import torch

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    rows = model.config.get_text_config().vocab_size
    ids = torch.randint(rows, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        both = model.eval()(input_ids=ids).logits.float()
        alone = model(input_ids=ids[:1]).logits.float()
    scale = both.abs().max().item()
    return {
        "finite": bool(torch.isfinite(both).all()),
        "batch_error": (both[:1] - alone).abs().max().item() / max(scale, 1e-30),
    }


def main() -> None:
    """Print one JSON object, the last line of stdout."""
    folder, depth, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
    warnings.simplefilter("ignore")
    stage = "load"
    try:
        model, report = load(folder, trust)
        report["class"] = type(model).__name__
        if depth == "forward":
            stage = "forward"
            report.update(forward(model))
    except Exception as error:
        report = {"error": f"{type(error).__name__}: {error}", "stage": stage}
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
