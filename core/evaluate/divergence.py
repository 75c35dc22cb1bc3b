"""How far a model's predictions are from its base's, on given text."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from regraft.core.errors import Unsupported
from regraft.core.evaluate.metric import Contrast, Measured, Measuring
from regraft.core.evaluate.perplexity import Ledger, notes_on_windows, within_positions
from regraft.core.evaluate.sample import Sample
from regraft.core.evaluate.texts import TextParams, Window, check_texts, read_texts, start_token, window_of, windows

if TYPE_CHECKING:
    from regraft.core.loaded import Loaded


class Divergence(Contrast[TextParams]):
    """Kullback-Leibler divergence KL(base || model) of next-token distributions, and agreement of the likeliest."""

    name = "divergence"
    summary = "KL divergence from the base, and how often the likeliest token is the same; needs --against."
    figures = MappingProxyType(
        {
            "kl": "mean over tokens of KL(base || model), in nats; 0 if nothing changed",
            "top1_agreement": "share of tokens at which both find the same token likeliest",
        }
    )
    Params = TextParams

    def check(self, params: TextParams) -> None:
        """Whether the texts are there."""
        check_texts(params)

    def contrast(self, subject: Loaded, base: Loaded, params: TextParams, measuring: Measuring) -> Measured:
        """Both models read the same windows.

        Raises:
            Unsupported: their tokenizers or vocabularies differ.
        """
        texts = read_texts(params, base.tokenizer)
        _check(subject, base, [text.ids for text in texts], read_texts(params, subject.tokenizer))
        size, start = window_of(base, params.window, measuring), start_token(base.tokenizer)
        kl, same = Ledger(), Ledger()
        for text in texts:
            measuring.tell(f"divergence: {text.name}, {len(text.ids)} tokens")
            for window in windows(text, size=size, stride=params.stride, start=start):
                far, agree = _predictions(subject, base, window)
                kl.add(text, window, far)
                same.add(text, window, agree)
        samples = {"kl": _mean(kl), "top1_agreement": _mean(same)}
        facts = {"texts": len(texts), "tokens": kl.tokens, "window": size}
        notes = notes_on_windows(subject, size, params.window)
        return Measured(samples, facts, notes, {"KL by position": kl.curve("KL(base || model) (nats)")})


def _mean(ledger: Ledger) -> Sample:
    keys = list(ledger.nats)
    return Sample([ledger.nats[key] for key in keys], [float(ledger.counts[key]) for key in keys], keys)


def _check(subject: Loaded, base: Loaded, theirs: Sequence[Any], ours: Sequence[Any]) -> None:
    rows = [_rows(one) for one in (subject, base)]
    if rows[0] != rows[1] or [list(text.ids) for text in ours] != [list(ids) for ids in theirs]:
        raise Unsupported(
            "the two models predict different tokens, so their predictions cannot be compared",
            where=f"{subject.checkpoint.label} and {base.checkpoint.label}",
            expected="the same tokens of the text, from vocabularies of the same size",
            found=f"{rows[0]} and {rows[1]} rows" if rows[0] != rows[1] else "other tokens",
            remedy="compare bits per byte instead, with --task perplexity:DATA",
        )


def _rows(one: Loaded) -> int:
    """Tokens that a model can predict."""
    weight = getattr(one.model.get_output_embeddings(), "weight", None)
    return int(one.model.config.get_text_config().vocab_size if weight is None else weight.shape[0])


def _predictions(subject: Loaded, base: Loaded, window: Window) -> tuple[list[float], list[float]]:
    """For each token that counts: KL in nats, and 1 where both find the same token likeliest."""
    import torch

    from regraft.core.data.batches import collate
    from regraft.core.measures.predictions import kept_logits
    from regraft.core.training.model import memory

    far: list[float] = []
    same: list[float] = []
    batch = collate([window.example], (0,), subject.device)
    pairs = zip(*(kept_logits(one.head, batch, "float32") for one in (subject, base)), strict=True)
    with torch.no_grad(), memory("measuring"), within_positions(subject, len(window.example)):
        for (ours, _), (theirs, _) in pairs:
            log_q, log_p = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
            terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
            far += terms.sum(-1).double().tolist()
            same += (ours.argmax(-1) == theirs.argmax(-1)).double().tolist()
    return far, same
