"""The keys of a recipe that name training data. Light: a transformation's parameters hold it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from regraft.core.recipe.references import DataReference
from regraft.core.transformation import Params

PositiveInt = Annotated[int, Field(ge=1)]


class DataSettings(Params):
    """Where training data comes from, and how rows become sequences.

    Args:
        source: a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.txt` or `.md` file, a folder of such files, a
            pattern (`texts/**/*.txt`), a folder that `datasets` saved, or a hub id; several are read one after another.
        kind: `text`, `completion`, `chat` or `preference`; None finds it by the names of the columns.
        columns: role (`text`, `prompt`, `completion`, `messages`, `chosen`, `rejected`) to column, for other names.
        text_unit: what one row of a plain text file is.
        split, subset: of a `datasets` source.
        learn: learn answers only, or all tokens.
        end: end texts and answers with the tokenizer's end token.
        max_tokens: of a sequence; None takes the model's window.
        min_tokens: shorter sequences are dropped.
        too_long: what becomes of longer ones: `refuse`, `truncate`, `split`, `drop`.
        pack: cut one stream of all texts into sequences of exactly `max_tokens`.
        restart_positions: in packed sequences, positions and attention begin anew with every text.
        max_rows: use so many sequences, drawn at random by the seed; None uses all.
        max_bad_rows: rows that may be skipped because they cannot be used.
    """

    source: DataReference | tuple[DataReference, ...]
    kind: Literal["text", "completion", "chat", "preference"] | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    text_unit: Literal["file", "paragraph", "line"] = "file"
    split: str = "train"
    subset: str | None = None
    learn: Literal["answer", "all"] = "answer"
    end: bool = True
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    min_tokens: Annotated[int, Field(ge=2)] = 2
    too_long: Literal["refuse", "truncate", "split", "drop"] = "refuse"
    pack: bool = False
    restart_positions: bool = False
    max_rows: PositiveInt | None = None
    max_bad_rows: Annotated[int, Field(ge=0)] = 0

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources, in order."""
        return self.source if isinstance(self.source, tuple) else (self.source,)

    def summary(self) -> dict[str, Any]:
        """What decides the sequences, without where the files stand; JSON values."""
        return self.model_dump(mode="json", exclude={"source"})


def _table(value: Any) -> Any:
    """The table that `value` is short for; its arrays as tuples, since what a function returns is no longer JSON."""
    table = {"source": value} if isinstance(value, str | list | tuple) else value
    if isinstance(table, dict) and isinstance(table.get("source"), list):
        return {**table, "source": tuple(table["source"])}
    return table


Data = Annotated[
    DataSettings,
    BeforeValidator(_table, json_schema_input_type=DataReference | tuple[DataReference, ...] | DataSettings),
]
"""A recipe's key for data: a source, several, or a table with `source` and how its rows become sequences."""
