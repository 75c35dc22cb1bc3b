"""What the model asks of its head: its last states at places of a corpus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, TransformationError
from regraft.core.training.model import memory
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.dynamic.curve import drawn
from regraft.plugins.tokenizer_retrofit.portable.searching import CandidateHead, Rows

_PLACES = 32
"""Of a passage that the index is measured on; of one that it is made by, all."""
_TOLERANCE = 1e-3


def states(checkpoint: Checkpoint, texts: Iterable[str], count: int, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, d] what the head reads, fp32, with a one behind it where the head has biases: to make an index by, and, of
    other passages, [at most count, d] to measure it on.

    Args:
        checkpoint: whose model runs, in fp32.
        texts: the corpus.
        count: most places that it is measured on.
        run: device, seed and trust.

    Raises:
        InputError: the corpus has less than two passages.
        TransformationError: the model computes its logits otherwise than by its head, so no other can take its place.
    """
    passages = drawn(texts, 2 * -(-count // _PLACES), run.seed_for("queries"))
    if len(passages) < 2:
        raise InputError("the corpus has too little text to measure an index on", where="corpus",
                         expected="two passages of 700 bytes", remedy="give more data")  # fmt: skip
    run.tell(f"the model reads {len(passages)} passages, for the index")
    model, tokenizer = run.model(checkpoint), run.tokenizer(checkpoint)
    head, seen = model.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad(), memory("measuring the index"):
        for number, passage in enumerate(passages):
            ids = torch.tensor([tokenizer(passage)["input_ids"]], device=head.weight.device)
            logits = model(input_ids=ids).logits
            if number == 0:
                _check_head(model, ids, logits)
            rows = seen[number][0].float().cpu()
            seen[number] = _some(rows) if number % 2 else rows
    hook.remove()
    made, measured = torch.cat(seen[::2]), torch.cat(seen[1::2])[:count]
    if head.bias is None:
        return made, measured
    return torch.cat([made, torch.ones(len(made), 1)], 1), torch.cat([measured, torch.ones(len(measured), 1)], 1)


def _some(rows: torch.Tensor) -> torch.Tensor:
    """Rows at even distances."""
    return rows[torch.arange(min(_PLACES, len(rows))) * len(rows) // min(_PLACES, len(rows))]


def _check_head(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> None:
    """A head that computes all candidates in the place of the model's own gives the model's own logits."""
    own = model.get_output_embeddings()
    known = torch.arange(len(own.weight), device=own.weight.device)
    bias = None if own.bias is None else own.bias.detach()
    rows = Rows(own.weight.detach(), own.weight.detach()[:0])
    model.set_output_embeddings(CandidateHead(rows, bias, known[:0], None, known, 1))
    try:
        found = model(input_ids=ids).logits[:, -1]
    finally:
        model.set_output_embeddings(own)
    if not torch.allclose(found, logits[:, -1], rtol=_TOLERANCE, atol=_TOLERANCE):
        raise TransformationError("the model computes logits otherwise than by its head", where=type(model).__name__,
                                  remedy="use tokenizer-retrofit, whose rows are the model's own")  # fmt: skip
