"""What the model says before and after: kept tokens have equal logits, and only tokens that there are get written."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch

from regraft.core.errors import InputError, TransformationError
from regraft.core.training.modes import without_dropout
from regraft.plugins.tokenizer_retrofit.proof import PROBES
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary

MOST_TOKENS = 32
"""Of a text, and of what is written."""
_TOLERANCE = 1e-3
"""Relative, of the length: products of other shapes may be summed in another order, and a wrong row is far off."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A text, as far as its tokens are kept, and what the model said of it before the step.

    Args:
        text: whole.
        before, after: [1, T] the tokens' ids.
        said: [T, kept] logits of the tokens that are kept; [T, hidden] last hidden states without a table of outputs.
    """

    text: str
    before: torch.Tensor
    after: torch.Tensor
    said: torch.Tensor


@dataclass(frozen=True, eq=False)
class KeptLogits:
    """What the model said before the step.

    Args:
        probes: of texts; none where no token is kept.
        kept: new ids of the tokens that are kept, in the order of their old ones.
        written: new ids that stand for a token.
        logits: whether the model has a table of outputs, so that it is logits that are compared.
        start: [1, T] new ids that it goes on from.
        writes: how many tokens it is to write; 0 where it writes none.
        stray: an id without a token that it wrote before the step already, if there are such ids still: then it is not
            asked to write tokens alone.
    """

    probes: list[Probe]
    kept: torch.Tensor
    written: Container[int]
    logits: bool
    start: torch.Tensor
    writes: int
    stray: int | None

    @classmethod
    def of(
        cls, model: Any, old: TokenizerFile, new: NewVocabulary, *, window: int = 2 * MOST_TOKENS, causal: bool = True
    ) -> KeptLogits:
        """By the model before the step, with the old vocabulary.

        Args:
            model: of transformers.
            old: its tokenizer.
            new: the new vocabulary.
            window: tokens that the model reads at most.
            causal: whether it predicts the next token, so that it can write.

        Raises:
            InputError: the model computes no numbers.
        """
        moved = dict(sorted(new.new_id().items()))
        rows, most, backend = torch.tensor(list(moved)), max(1, min(MOST_TOKENS, window // 2)), old.backend()
        logits, probes = _has_logits(model, max(moved, default=0)), []
        for text in PROBES:
            cut = [index for index in backend.encode(text, add_special_tokens=False).ids if index in moved][:most]
            if not cut:
                continue
            before, after = torch.tensor([cut]), torch.tensor([[moved[index] for index in cut]])
            said = _said(model, before, rows if logits else None)
            if bool(said.isnan().any()):
                raise InputError("the base computes no numbers", where=repr(text), found="NaN",
                                 remedy="look for faulty weights: regraft verify --deep")  # fmt: skip
            probes.append(Probe(text, before, after, said))
        kept = torch.tensor(list(moved.values()))
        writes = most if causal and logits and moved and model.can_generate() else 0
        begun = (probes[0].before, probes[0].after) if probes else (rows[None, :1], kept[None, :1])
        written = _greedy(model, begun[0], writes) if writes else []
        holes = any(index not in new.tokenizer.tokens for index in range(len(new.origins)))
        stray = next((index for index in written if index not in old.tokens), None) if holes else None
        return cls(probes, kept, new.tokenizer.tokens, logits, begun[1], writes, stray)

    def check(self, model: Any) -> None:
        """By the model after the step, as its rows were made; it must also write a text of tokens that there are.

        Raises:
            TransformationError: a kept token has other logits than before, or an id without a token is the likeliest.
        """
        for probe in self.probes:
            gap = _gap(_said(model, probe.after, self.kept if self.logits else None), probe.said)
            if not gap <= _TOLERANCE:
                what = "logits" if self.logits else "last hidden states"
                raise TransformationError(f"kept tokens have other {what} than before", where=repr(probe.text),
                                          expected=f"a difference below {_TOLERANCE} of their length",
                                          found=f"{gap:.3g}")  # fmt: skip
        if not self.writes or self.stray is not None:
            return
        for index in _greedy(model, self.start, self.writes):
            if index not in self.written:
                raise TransformationError("the model writes an id that is no token", found=f"id {index}",
                                          expected="suppress_tokens in generation_config.json to name it")  # fmt: skip


def _gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of a column, by its length or that of the usual one, whichever is more.

    Of all columns together one wrong row among a hundred thousand would be a difference of a few thousandths.
    """
    apart = torch.where(found == wanted, 0.0, found - wanted).norm(dim=0)
    lengths = wanted.nan_to_num(posinf=0.0, neginf=0.0).norm(dim=0)
    usual = lengths.square().mean().sqrt()
    return float((apart / lengths.clamp(min=float(usual)).clamp(min=1e-30)).max())


def _greedy(model: Any, start: torch.Tensor, count: int) -> list[int]:
    """The ids that the model goes on with, generated by the checkpoint's own settings but for chance and ends."""
    ids = start.to(next(model.parameters()).device)
    with torch.no_grad(), without_dropout(model):
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, num_return_sequences=1,
            max_new_tokens=count, min_new_tokens=count,
        )  # fmt: skip
    written: list[int] = found[0, ids.shape[1] :].tolist()
    return written


def _has_logits(model: Any, index: int) -> bool:
    """Whether the model has an output for each row of its embeddings; classifiers and bodies have not."""
    found = _outputs(model, torch.tensor([[index]]))
    return found is not None and found.ndim == 3 and found.shape[-1] == model.get_input_embeddings().weight.shape[0]


def _said(model: Any, ids: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    """[T, columns] logits, or without columns [T, hidden] last hidden states; fp32, on the CPU."""
    found = _outputs(model, ids, states=columns is None)
    assert found is not None
    said = found[0].float().cpu()
    return said if columns is None else said[:, columns]


def _outputs(model: Any, ids: torch.Tensor, *, states: bool = False) -> torch.Tensor | None:
    """Logits by whatever name, None without; or the last hidden states."""
    cache = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
    with torch.no_grad(), without_dropout(model):
        found = model(input_ids=ids.to(next(model.parameters()).device), output_hidden_states=states, **cache)
    if states:
        last: torch.Tensor = found.hidden_states[-1]
        return last
    logits: torch.Tensor | None = found.get("logits", found.get("prediction_logits"))
    return logits
