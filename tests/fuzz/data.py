"""Targets: data of every form, for training and for measuring."""

from __future__ import annotations

import json
from typing import Any

from tests.fuzz import mutations
from tests.fuzz.contract import target
from tests.fuzz.honest import document, put, scratch

ROWS = (
    b'{"text": "one two"}\n{"text": "three"}\n',
    b'{"prompt": "a", "completion": " b"}\n{"prompt": "c", "completion": " d"}\n',
    b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n',
    b'{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}\n',
    b'{"prompt": "a", "chosen": " b", "rejected": " c"}\n',
)


def _prepared(suffix: str, data: bytes, **settings: Any) -> object:
    """Rows of a file, tokenised."""
    from regraft.core.data.load import load_data
    from regraft.core.data.settings import DataSettings
    from tests.core.data.vocabularies import tokenizer

    file = put(scratch() / f"rows{suffix}", data)
    chosen = DataSettings(source=str(file), max_bad_rows=1, too_long="truncate", **settings)
    return load_data(chosen, tokenizer("characters"), window=64).summary()


@target(mutations.mutated_lines, lambda: list(ROWS))
def json_lines(data: bytes) -> object:
    """Training data, a JSON object a line."""
    return _prepared(".jsonl", data)


@target(mutations.mutated_json, lambda: [document([json.loads(line) for line in row.splitlines()]) for row in ROWS])
def json_rows(data: bytes) -> object:
    """Training data in one JSON list."""
    return _prepared(".json", data)


@target(mutations.mutated_text, lambda: [b'prompt,completion\n"a, b",c\nd,"e\n""f"""\n', b"text\none\ntwo\n"])
def csv(data: bytes) -> object:
    """Training data with commas."""
    return _prepared(".csv", data)


@target(mutations.mutated_text, lambda: [b"prompt\tcompletion\na\tb\nc\td\n"])
def tsv(data: bytes) -> object:
    """Training data with tabs."""
    return _prepared(".tsv", data)


@target(mutations.mutated_text, lambda: ["One é.\n\nTwo.\r\nThree\n".encode(), b"\xef\xbb\xbfa\n\n\nb"])
def plain_text(data: bytes) -> object:
    """Training data without form."""
    return _prepared(".txt", data, text_unit="paragraph", max_rows=2)


def parquet_files() -> list[bytes]:
    from io import BytesIO

    import pyarrow
    from pyarrow import parquet

    found = []
    for table in ({"text": ["a", "b"]}, {"prompt": ["a"], "completion": ["b"], "n": [1.5]}):
        file = BytesIO()
        parquet.write_table(pyarrow.table(table), file, compression="none")
        found.append(file.getvalue())
    return found


@target(mutations.mutated_bytes, parquet_files)
def parquet(data: bytes) -> object:
    """Training data as Parquet."""
    return _prepared(".parquet", data)


@target(mutations.mutated_lines, lambda: [b'{"series": [1.0, 2.5, 3], "period": 2}\n{"target": [0, 1]}\n'])
def series(data: bytes) -> object:
    """Time series."""
    from regraft.core.data.series import read_series
    from regraft.core.data.settings import DataSettings

    file = put(scratch() / "series.jsonl", data)
    return read_series(DataSettings(source=str(file), max_bad_rows=1), least=2, why="two")


QUESTIONS = (
    b'{"prompt": "Fire is", "options": [" hot", " cold"], "answer": 0}\n'
    b'{"prompt": "Ice is", "options": [" hot", " cold"], "answer": " cold"}\n'
)


@target(mutations.mutated_lines, lambda: [QUESTIONS])
def choices(data: bytes) -> object:
    """Questions of `eval`, tokenised."""
    from regraft.core.measures.choices import read_choices, readings_of
    from tests.core.data.vocabularies import tokenizer

    return readings_of(tokenizer("characters"), read_choices(put(scratch() / "choices.jsonl", data)), window=64)


def pictures() -> list[bytes]:
    from io import BytesIO

    from PIL import Image

    found = []
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        file = BytesIO()
        Image.new("RGB", (8, 6), "red").save(file, kind)
        found.append(file.getvalue())
    return found


@target(mutations.mutated_bytes, pictures)
def image(data: bytes) -> object:
    """An image of any format."""
    from regraft.plugins.vlora.images import read_image

    return read_image(put(scratch() / "image.png", data)).size
