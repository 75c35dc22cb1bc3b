"""The states of words' first tokens, and a linear head on these."""

from __future__ import annotations

from typing import Any

import torch

from regraft_labels.rows import Sentence, first_tokens


def word_states(body: Any, tokenizer: Any, sentence: Sentence, device: str) -> torch.Tensor:
    """The last hidden state at each word's first token, [words, D] in fp32."""
    encoded = tokenizer(sentence.text, return_tensors="pt", return_offsets_mapping=True)
    places = first_tokens(sentence, [tuple(pair) for pair in encoded["offset_mapping"][0].tolist()])
    with torch.inference_mode():
        states = body(input_ids=encoded["input_ids"].to(device), use_cache=False).last_hidden_state[0]
    return states[places].float().cpu()


def fit_head(states: torch.Tensor, labels: torch.Tensor, count: int, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [labels, D] and bias [labels] of a multinomial logistic regression: CE / N + decay ||W||² / 2.

    Args:
        states: [N, D].
        labels: [N], from 0 to count - 1.
        count: labels that there are.
        decay: of the weight, not of the bias.
    """
    x = states.double()
    weight = torch.zeros(count, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(count, dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        total = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    return weight.detach(), bias.detach()
