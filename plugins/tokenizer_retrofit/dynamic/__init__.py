"""`dynamic-tokenization`: a runtime in the checkpoint that reads texts in fewer, longer tokens, chosen batch by batch.

Feher, Vulić, Minixhofer (arXiv 2411.18553, section 3): batch-level merges, embeddings composed on the fly. Deviations:
ties go to the bytes that sort first; no merge crosses a pre-token of the text, where the paper looks at the joined
string alone; rows are means or come from a table, since its hypernetworks are not to be had.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import Run, Transformation
from regraft.plugins.tokenizer_retrofit.dynamic.params import DynamicTokenizationParams


class DynamicTokenization(Transformation[DynamicTokenizationParams]):
    """Puts a policy and a runtime beside weights and tokenizer, which stay as they are."""

    name = "dynamic-tokenization"
    summary = "Let a checkpoint read texts in fewer, longer tokens that are chosen for each batch."
    paper = "Feher et al. 2024, Dynamic Tokenization, arXiv 2411.18553"
    loads_with = "stock transformers; merging: runtime.py in the checkpoint, with torch and tokenizers"
    Params = DynamicTokenizationParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: half of the way on a few sentences, with a table of eight rows."""
        from regraft.core.testing.data import texts, write_rows

        rows = write_rows(folder / "texts.jsonl", texts(16))
        return {"corpus": str(rows), "reduction": 0.5, "composer": "table", "table_size": 8}

    def check(self, checkpoint: Checkpoint, params: DynamicTokenizationParams) -> None:
        """Refuse what cannot be done.

        Raises:
            Unsupported: no tokenizer.json, embeddings of more kinds than one, or no table that rows could be made of.
            UsageError, InputError: the corpus is not there.
        """
        from regraft.plugins.tokenizer_retrofit.dynamic.rewrite import check

        check(checkpoint, params)

    def plan(self, checkpoint: Checkpoint, params: DynamicTokenizationParams) -> Outline:
        """The files that are added; no tensor changes."""
        from regraft.plugins.tokenizer_retrofit.dynamic.rewrite import outline

        return outline(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: DynamicTokenizationParams, run: Run) -> Patch:
        """Policy, runtime, and a table where there is one."""
        from regraft.plugins.tokenizer_retrofit.dynamic.rewrite import apply

        return apply(checkpoint, params, run)
