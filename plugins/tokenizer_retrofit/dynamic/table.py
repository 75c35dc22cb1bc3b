"""The table of rows: the merged tokens that a corpus makes most likely, and an embedding for each, by its bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.specs import FLOAT_CODES
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.dynamic.params import DynamicTokenizationParams
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

if TYPE_CHECKING:
    import torch

_NAMES = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight", "tok_embeddings.weight")
_MIN_COUNT, _LONGEST = 3, 32
"""As `extend` has them where nothing else is said."""
_SHARES = {"focus": 1.0, "blend": 0.5}
"""Of the mixture that FOCUS finds; the rest is the mean of the rows that spell the token."""


def embeddings_of(checkpoint: Checkpoint, tokenizer: TokenizerFile) -> str:
    """The name of the word embeddings; also of families that have no roles here, such as BERT.

    Raises:
        Unsupported: no tensor, or more than one, looks like them.
    """
    found = [
        name for name, spec in checkpoint.specs.items()
        if name.endswith(_NAMES) and len(spec.shape) == 2 and spec.dtype in FLOAT_CODES and spec.rows >= tokenizer.rows
    ]  # fmt: skip
    if len(found) != 1:
        raise Unsupported(
            "cannot tell which tensor holds the word embeddings", where=checkpoint.label,
            expected=f"one whose name ends with {', '.join(_NAMES)}", found=", ".join(found) or "none",
            remedy='use composer = "mean", which needs no table',
        )  # fmt: skip
    return found[0]


def make_table(
    checkpoint: Checkpoint, old: TokenizerFile, params: DynamicTokenizationParams, run: Run
) -> dict[str, torch.Tensor]:
    """Tensors of composer.safetensors: `rows` [n, d], `bytes` [total] of all tokens, and where each `ends` [n].

    The tokens are those that `extend` of tokenizer-retrofit appends, and the rows those that its `init` makes.

    Raises:
        InputError: the corpus has nothing to merge.
    """
    import torch

    from regraft.plugins.tokenizer_retrofit.extend import extend
    from regraft.plugins.tokenizer_retrofit.focus import focus
    from regraft.plugins.tokenizer_retrofit.rows import Rows, mixed

    assert params.corpus is not None
    corpus = Corpus(params.corpus, params.corpus_bytes)
    tensor = checkpoint.tensor(embeddings_of(checkpoint, old))
    longest = params.max_token_bytes or _LONGEST
    new = extend(
        old, tensor.spec.rows, corpus.texts(), size=params.table_size, min_count=_MIN_COUNT, max_length=longest,
        tell=run.tell,
    )  # fmt: skip
    backend = new.tokenizer.backend()
    lines = (line for text in corpus.texts() for line in text.splitlines())
    tokens = (backend.encode(line, add_special_tokens=False).ids for line in lines)
    mixture = focus(new.origins, tokens, seed=run.seed_for("auxiliary space"))
    made = mixed(tensor, new.origins, mixture, _SHARES[params.table_rows])
    assert made.weights is not None
    spelled = {index: new.tokenizer.bytes_of(token) for index, token in new.tokenizer.tokens.items()}
    chosen = [index for index, origin in enumerate(new.origins) if origin.kept is None and spelled.get(index)]
    parts, weights = [made.parts[index] for index in chosen], [made.weights[index] for index in chosen]
    rows = Rows(parts, weights, made.brought).operation(tensor.spec.name, 0).prepare("cpu")
    data = [spelled[index] or b"" for index in chosen]
    return {
        "rows": rows(0, len(chosen), tensor.load()),
        "bytes": torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8),
        "ends": torch.tensor([len(part) for part in data]).cumsum(0),
    }
