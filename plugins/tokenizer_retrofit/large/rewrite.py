"""Plan and apply: tokens, rows, index, policy and runtime; no tensor and no tokenizer changes."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.data.load import check_sources
from regraft.core.errors import Unsupported, UsageError
from regraft.core.patch import Outline, Patch
from regraft.core.training.footprint import model_bytes
from regraft.core.transformation import Run
from regraft.core.verify.structure import TOKENIZER
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.dynamic.rewrite import check_cut, refuse_layers
from regraft.plugins.tokenizer_retrofit.large.appended import appended
from regraft.plugins.tokenizer_retrofit.large.params import LargeVocabularyParams
from regraft.plugins.tokenizer_retrofit.metadata import token_ids_of
from regraft.plugins.tokenizer_retrofit.portable import LARGE, runtime
from regraft.plugins.tokenizer_retrofit.tables import Tables
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

if TYPE_CHECKING:
    import torch

    from regraft.plugins.tokenizer_retrofit.large.index import Recall

FOLDER = "large_vocabulary"
POLICY, RUNTIME, INDEX = f"{FOLDER}/policy.json", f"{FOLDER}/runtime.py", f"{FOLDER}/index.faiss"
TOKENS, ROWS = f"{FOLDER}/tokens.safetensors", f"{FOLDER}/rows.safetensors"

_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_ENDS = ("eos_token_id",)
_NOTES = ("weights and tokenizer stay as they are",)


def check(checkpoint: Checkpoint, params: LargeVocabularyParams) -> None:
    """Refuse what headers, config, tokenizer.json and the machine show to be impossible."""
    from regraft.plugins.tokenizer_retrofit.large.library import check_library

    old = TokenizerFile.of(checkpoint)
    refuse_layers(checkpoint)
    if not Tables.of(checkpoint, old).causal:
        raise Unsupported("this model does not predict the next token", where=checkpoint.label,
                          found=checkpoint.config.get("model_type"), remedy="use dynamic-tokenization")  # fmt: skip
    check_library()
    if params.corpus is not None:
        check_sources(params.corpus)


def outline(checkpoint: Checkpoint, params: LargeVocabularyParams) -> Outline:
    """Which files come; their sizes are known after the run."""
    tables = Tables.of(checkpoint, TokenizerFile.of(checkpoint))
    most = params.size if params.tokens is None else params.tokens.read_bytes().count(b"\n") + 1
    specs = [checkpoint.specs[name] for name in tables.names]
    rows = sum(most * (spec.nbytes // spec.rows) for spec in specs)
    width = specs[0].shape[1]
    index = (tables.rows + most) * (width * _ITEM_BYTES[params.storage] + 8)
    reading = model_bytes(checkpoint) if params.corpus is not None else 0
    return Outline(
        files={POLICY: None, RUNTIME: len(_runtime()), TOKENS: None, ROWS: None, INDEX: None},
        notes=_NOTES,
        exact=False,
        workspace_bytes=3 * sum(math.prod(spec.shape) * 4 for spec in specs) + 2 * index + reading,
        scratch_bytes=2 * (rows + index),
    )


def apply(checkpoint: Checkpoint, params: LargeVocabularyParams, run: Run) -> Patch:
    """Make the files.

    Raises:
        InputError: the corpus or the list has no new token; the hypernetwork is for another model.
        UsageError: there are more lists than rows.
        TransformationError: transformers cuts texts otherwise than tokenizer.json says, or the model does not use its
            head as others do.
    """
    from safetensors.torch import save

    from regraft.plugins.tokenizer_retrofit.large.rows import write_rows

    old = TokenizerFile.of(checkpoint)
    tables = Tables.of(checkpoint, old)
    check_cut(old, run.tokenizer(checkpoint))
    new = appended(old, tables.rows, params, run)
    with _workplace(run) as folder:
        write_rows(folder / "rows.safetensors", checkpoint, tables, new.parts, params, run.tell)
        searched = _Searched(checkpoint, old, tables, len(new.parts), folder)
        lists, recalls = _index(searched, params, run)
        enough = (one.probes for one in recalls if one is recalls[-1] or one.first >= params.recall)
        probes = params.probes or next(enough)
        policy = _policy(searched, params) | {"probes": probes, "lists": lists}
        files = {
            POLICY: FileRef(data=(json.dumps(policy, indent=1, sort_keys=True) + "\n").encode()),
            RUNTIME: FileRef(data=_runtime()),
            TOKENS: FileRef(data=save(new.tensors(), metadata={"format": "pt"})),
            ROWS: _kept(folder / "rows.safetensors", run),
            INDEX: _kept(folder / "index.faiss", run),
        }
    figures: dict[str, Any] = {
        "tokens": len(new.parts), "rows": searched.total, "lists": lists, "probes": probes,
        "recall": [one.figures() for one in recalls], **{f"left_out_{why}": n for why, n in new.left_out.items()},
    }  # fmt: skip
    if params.corpus is not None:
        figures["corpus"] = Corpus(params.corpus).summary()
    return Patch(files=files, metrics=figures, notes=(*_NOTES, *new.notes))


@dataclass(frozen=True, eq=False)
class _Searched:
    """All rows that may be written.

    Args:
        checkpoint, old, tables: of the model.
        new: how many rows are appended.
        folder: with rows.safetensors, and index.faiss once there is one.
    """

    checkpoint: Checkpoint
    old: TokenizerFile
    tables: Tables
    new: int
    folder: Path

    @property
    def never(self) -> list[int]:
        """Ids that are never written: rows without a token, and those that generation_config suppresses.

        transformers passes over suppressed ids that have no row, and so does this: -1 is not the last row.
        """
        suppressed = set(self.checkpoint.generation_config.get("suppress_tokens") or ())
        return [index for index in range(self.tables.rows) if index not in self.old.tokens or index in suppressed]

    @property
    def always(self) -> list[int]:
        """Ids that are always candidates: special tokens, and what ends a text."""
        special = {token.id for token in self.old.added if token.special}
        for config in (self.checkpoint.config, self.checkpoint.generation_config):
            special |= set(token_ids_of({key: config[key] for key in _ENDS if config.get(key) is not None}))
        return sorted(index for index in special - set(self.never) if 0 <= index < self.tables.rows)

    @property
    def total(self) -> int:
        """How many rows there are."""
        return self.tables.rows + self.new - len(self.never)

    @property
    def width(self) -> int:
        """Numbers of a row, its bias included."""
        return self.checkpoint.specs[self.tables.embeddings].shape[1] + (self.tables.bias is not None)

    def vectors(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Ids [n] and rows [n, width] of the head, fp32, its biases behind them, piece by piece."""
        import torch

        from regraft.plugins.tokenizer_retrofit.large.rows import ROWS_AT_ONCE, pieces

        own = self.checkpoint.load(self.tables.head or self.tables.embeddings)
        bias = None if self.tables.bias is None else self.checkpoint.load(self.tables.bias)
        known = torch.ones(len(own), dtype=torch.bool)
        known[self.never] = False
        for ids in torch.split(known.nonzero().flatten(), ROWS_AT_ONCE):
            yield ids, _joined(own[ids], None if bias is None else bias[ids])
        file, start = self.folder / "rows.safetensors", len(own)
        biases = pieces(file, "bias")
        for rows in pieces(file, "embeddings" if self.tables.head is None else "head"):
            yield torch.arange(start, start + len(rows)), _joined(rows, None if bias is None else next(biases))
            start += len(rows)


def _joined(rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    import torch

    return rows.float() if bias is None else torch.cat([rows.float(), bias.float()[:, None]], 1)


def _index(searched: _Searched, params: LargeVocabularyParams, run: Run) -> tuple[int, Sequence[Recall]]:
    """Build the index and, with a corpus, measure it; its lists, and what is found in so many of them."""
    from regraft.plugins.tokenizer_retrofit.large.index import build_index, default_lists, likeliest, measure

    lists = params.lists or default_lists(searched.total)
    if max(lists, params.probes or 1) > searched.total or (params.probes or 1) > lists:
        raise UsageError("the index has fewer rows than lists, or fewer lists than probes", where="lists, probes",
                         expected=f"probes up to lists, lists up to {searched.total}",
                         found=f"{params.probes} probes, {lists} lists")  # fmt: skip
    file, made, measured = searched.folder / "index.faiss", None, None
    if params.corpus is not None:
        from regraft.plugins.tokenizer_retrofit.large.queries import states

        texts = Corpus(params.corpus, params.corpus_bytes).texts()
        made, measured = states(searched.checkpoint, texts, params.queries, run)
    run.tell(f"an index of {searched.total} rows in {lists} lists")
    build_index(
        searched.vectors, total=searched.total, width=searched.width, lists=lists, storage=params.storage,
        seed=run.seed_for("index"), file=file, asked=made,
    )  # fmt: skip
    if measured is None:
        return lists, ()
    return lists, list(measure(file, measured, likeliest(searched.vectors, measured), params.candidates))


def _policy(searched: _Searched, params: LargeVocabularyParams) -> dict[str, Any]:
    """What the runtime goes by, but for lists and probes."""
    old, pad = searched.old, searched.checkpoint.config.get("pad_token_id")
    return {
        "format": 1,
        "rows": searched.tables.rows,
        "tokens": searched.new,
        "always": searched.always,
        "never": searched.never,
        "candidates": params.candidates,
        "storage": params.storage,
        "init": params.init,
        "pad_token_id": pad if isinstance(pad, int) and pad >= 0 else 0,
        "boundary": "pretoken",
        "max_token_bytes": None,
        "min_count": 1,
        "spelling": old.spelling,
        "unknown": old.unknown,
        "tokenizer_sha256": searched.checkpoint.files[TOKENIZER].sha256(),
    }


def _runtime() -> bytes:
    return runtime(LARGE, extra=frozenset({"faiss"}))


@contextmanager
def _workplace(run: Run) -> Iterator[Path]:
    """A folder for the large files: the run's, where they stay until they are written out, or one that is gone."""
    if run.cache is not None:
        folder = run.cache / f"{FOLDER}-{run.step}-{run.rank}"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="regraft-") as scratch:
        yield Path(scratch)


def _kept(file: Path, run: Run) -> FileRef:
    return FileRef(path=file) if run.cache is not None else FileRef(data=file.read_bytes())
