"""Run in an environment without regraft: load two exports in stock transformers, compare logits, generate.

Usage: python reload.py NATIVE ABF_ONLY WINDOW [short]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def logits(model: torch.nn.Module, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Logits [1, length, vocabulary] of `ids` at positions first, first + 1, ..."""
    positions = torch.arange(first, first + ids.shape[1])[None]
    with torch.inference_mode():
        return model(input_ids=ids, position_ids=positions).logits


def main() -> None:
    """Raise AssertionError unless everything holds."""
    native_path, plain_path, window = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(native_path)
    native, native_info = AutoModelForCausalLM.from_pretrained(
        native_path, dtype=torch.float32, output_loading_info=True
    )
    plain, plain_info = AutoModelForCausalLM.from_pretrained(plain_path, dtype=torch.float32, output_loading_info=True)
    for info in (native_info, plain_info):
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = tokenizer(
        "The context window of a language model is the text that it can see at once.", return_tensors="pt"
    ).input_ids
    assert torch.equal(logits(native, ids, 0), logits(plain, ids, 0))
    assert torch.equal(logits(native, ids, window - ids.shape[1]), logits(plain, ids, window - ids.shape[1]))
    apart = (logits(native, ids, window) - logits(plain, ids, window)).abs().max().item()
    assert apart > 0.01, apart
    classes = f"{type(native).__name__} and {type(plain).__name__}"
    print(f"{classes}: the same bits up to position {window - 1}, {apart:.3g} apart from {window} on")
    assert tokenizer.model_max_length == 2 * window, tokenizer.model_max_length
    if sys.argv[4:] == ["short"]:
        return
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = native.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in text, text
    print(f"asked for the capital of France: {text.strip()}")


if __name__ == "__main__":
    main()
