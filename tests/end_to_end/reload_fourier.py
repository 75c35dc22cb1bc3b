"""Run where regraft cannot be imported: a checkpoint with a Fourier head beside the one before, and what users call.

Usage: python reload_fourier.py BEFORE AFTER
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.modules["regraft"] = None  # type: ignore[assignment]

TEXTS = [
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def mean(values):\n    return sum(values) / len(values)",
    "In 1969 the first people walked on the moon.",
]


def main() -> None:
    """Raise AssertionError unless everything holds."""
    before, after = sys.argv[1:]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(after, trust_remote_code=True)
    stock = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32)
    model, info = AutoModelForCausalLM.from_pretrained(
        after, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    start, bins = model.lm_head.start, model.lm_head.bins
    apart = 0.0
    with torch.inference_mode():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            one, two = stock(ids).logits[..., :start], model(ids).logits[..., :start]
            apart = max(apart, (one - two).abs().max().item())
    assert apart <= 1e-5, apart
    print(f"logits of text: at most {apart:.1g} apart on {len(TEXTS)} texts")
    prompt = tokenizer("The mean of 37 and 62 is", return_tensors="pt")
    density = model.density(prompt.input_ids)
    low, middle, high = (density.quantile(level).item() for level in (0.05, 0.5, 0.95))
    assert density.log_masses().exp().sum().sub(1).abs() < 1e-4
    assert 0 <= low <= middle <= high <= 100
    processor = sys.modules[type(model).__module__].NumbersAsOne(model)
    output = model.generate(**prompt, max_new_tokens=1, do_sample=False, logits_processor=[processor])
    ids = prompt.input_ids
    loss = model(ids, labels=ids).loss
    assert loss.isfinite()
    assert output.shape[1] == ids.shape[1] + 1
    print(f"the density behind 'The mean of 37 and 62 is': {density.mean().item():.1f}, {low:.1f} to {high:.1f}")
    print(f"{bins} bins behind {start} tokens; loss of the prompt {loss.item():.3f}")


if __name__ == "__main__":
    main()
