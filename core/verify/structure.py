"""Config against tensors, tie flag against heads, vocabulary against tokenizer: from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.buffers import reading
from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import InputError, RegraftError, Unsupported
from regraft.core.transfer import hash_range, new_hasher

TOKENIZER = "tokenizer.json"

_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be. A fatal one makes the checkpoint unusable."""

    message: str
    where: str
    expected: str = ""
    found: str = ""
    remedy: str = ""
    fatal: bool = True

    @classmethod
    def of(cls, error: RegraftError) -> Finding:
        """The fatal finding that says what `error` says."""
        return cls(error.message, error.where or "", error.expected or "", error.found or "", error.remedy or "")

    def __str__(self) -> str:
        """One line."""
        details = [f"expected {self.expected}"] * bool(self.expected) + [f"found {self.found}"] * bool(self.found)
        return f"{self.where}: {self.message}" + (f" ({', '.join(details)})" if details else "")


def check_structure(checkpoint: Checkpoint, families: Sequence[Any] = (), *, vocabulary: bool = True) -> list[Finding]:
    """Everything that headers, config and tokenizer tell against each other.

    Args:
        checkpoint: what is checked; no weight is read, except a stored head that the config calls tied.
        families: rows of plugins for `architecture_of`.
        vocabulary: whether to parse the tokenizer; see `same_vocabulary`.
    """
    try:
        architecture = architecture_of(checkpoint.config, checkpoint.specs, families=families, derive=False)
    except Unsupported as error:
        message = f"tensors were not compared with the config, because {error.message}"
        return [Finding(message, f"{checkpoint.label}: {error.where}", found=error.found or "", fatal=False)]
    except InputError as error:
        return [replace(Finding.of(error), where=f"{checkpoint.label}: {error.where or CONFIG}")]
    findings = [*_tensors(checkpoint, architecture), *_tied(checkpoint, architecture)]
    return [*findings, *_vocabulary(checkpoint, architecture)] if vocabulary else findings


def same_vocabulary(before: Checkpoint, after: Checkpoint) -> bool:
    """Whether tokenizer and tensors have kept their sizes, so that what was true of the tokenizer still is.

    Parsing a large one costs a tenth of a second, as much as all else that `apply` does for a change of config.
    """
    shapes = [{name: spec.shape for name, spec in checkpoint.specs.items()} for checkpoint in (before, after)]
    return shapes[0] == shapes[1] and before.files.get(TOKENIZER) == after.files.get(TOKENIZER)


def are(count: int, noun: str) -> str:
    """`1 tensor is`, `3 tensors are`."""
    return f"{count} {noun} is" if count == 1 else f"{count} {noun}s are"


def raise_findings(findings: Sequence[Finding], kind: type[RegraftError]) -> None:
    """Raise the first fatal finding as `kind`, with the number of the others."""
    fatal = [finding for finding in findings if finding.fatal]
    if not fatal:
        return
    first, others = fatal[0], len(fatal) - 1
    message = first.message + (f" (and {others} more)" if others else "")
    raise kind(
        message,
        where=first.where,
        expected=first.expected or None,
        found=first.found or None,
        remedy=first.remedy or None,
    )


def _tensors(checkpoint: Checkpoint, architecture: Architecture) -> Iterator[Finding]:
    expected = architecture.expected_specs()
    head = _head(architecture)
    for name, shape in expected.items():
        spec = checkpoint.specs.get(name)
        where = f"{checkpoint.label}: {name}"
        if spec is None:
            yield Finding(
                "a tensor is missing that the config calls for",
                where,
                f"shape {list(shape)}",
                "no such tensor",
                "correct config.json, or fetch the missing weights",
            )
        elif spec.shape != tuple(shape):
            yield Finding(
                "the shape contradicts the config",
                where,
                f"{list(shape)}",
                f"{list(spec.shape)}",
                "config.json and weights are of different models: fetch both again",
            )
    extra = [
        name for name in checkpoint.specs if name not in expected and name != head and not architecture.ignores(name)
    ]
    if extra:
        shown = ", ".join(extra[:_SHOWN]) + (", ..." if len(extra) > _SHOWN else "")
        yield Finding(
            f"{are(len(extra), 'tensor')} unknown to the config and carried unchanged",
            checkpoint.label,
            found=shown,
            fatal=False,
        )


def _head(architecture: Architecture) -> str:
    """Name of the stored head; of the embedding where the head is tied and not stored."""
    return "" if architecture.headless else architecture.slot("lm_head").tensor


def _tied(checkpoint: Checkpoint, architecture: Architecture) -> Iterator[Finding]:
    """A tied config with a stored head: harmless only if the head is the embedding, byte for byte."""
    head, embedding = _head(architecture), architecture.slot("embed_tokens").tensor
    if not architecture.tie_word_embeddings or head == embedding or head not in checkpoint.specs:
        return
    if _digest(checkpoint, head) == _digest(checkpoint, embedding):
        yield Finding("the tied head is stored a second time", f"{checkpoint.label}: {head}", fatal=False)
    else:
        yield Finding(
            "the config ties the head to the embedding, but another head is stored",
            f"{checkpoint.label}: {head}",
            f"no {head}, or one equal to {embedding}",
            "a different tensor",
            "set tie_word_embeddings to false in config.json, or remove the stored head",
        )


def _digest(checkpoint: Checkpoint, name: str) -> str:
    hasher, tensor = new_hasher("xxh3"), checkpoint.tensor(name)
    if tensor.raw is None:
        import torch

        hasher.update(tensor.load().contiguous().view(torch.uint8).numpy().data)
    else:
        with reading(tensor.raw.path) as descriptor:
            hash_range(descriptor, tensor.raw.offset, tensor.raw.nbytes, hasher, where=tensor.raw.path)
    return hasher.hexdigest()


def _vocabulary(checkpoint: Checkpoint, architecture: Architecture) -> Iterator[Finding]:
    tokenizer = checkpoint.json(TOKENIZER)
    ids = token_ids(tokenizer)
    embedding = checkpoint.specs.get(architecture.slot("embed_tokens").tensor)
    if not ids or embedding is None:
        return
    needed = max(ids.values()) + 1
    if needed > embedding.shape[0]:
        last = max(ids, key=lambda token: ids[token])
        yield Finding(
            "the tokenizer has ids beyond the embedding's rows",
            f"{checkpoint.label}: {TOKENIZER}",
            f"ids below {embedding.shape[0]}",
            f"id {needed - 1} ({last!r})",
            "use the tokenizer that belongs to the weights, or add rows first",
        )


def token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json with its id, added tokens included."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        ids = {token: index for token, index in vocabulary.items() if isinstance(index, int)}
    else:
        pieces = vocabulary if isinstance(vocabulary, Sequence) else ()
        ids = {str(piece[0]): index for index, piece in enumerate(pieces) if isinstance(piece, Sequence) and piece}
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping) and isinstance(token.get("id"), int) and str(token.get("content")) not in ids:
            ids[str(token.get("content"))] = token["id"]
    return ids
