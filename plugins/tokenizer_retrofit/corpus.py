"""Counted words of a corpus: normalised and cut as the tokenizer does it, each with its tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from regraft.core.data.load import files_of, read_rows
from regraft.core.data.names import distinct_names
from regraft.core.data.readers import TEXT
from regraft.core.data.records import Text, find_columns
from regraft.core.data.rows import BadRows, Row
from regraft.core.data.settings import DataSettings
from regraft.core.errors import InputError
from regraft.plugins.tokenizer_retrofit.merges import Word
from regraft.plugins.tokenizer_retrofit.spelling import SPACE
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.verbatim import between

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PIECE_CHARACTERS = 1 << 16
_FILE_CHARACTERS = 1 << 24
"""Of a plain text that are held at once; a longer one comes as several texts, apart where a line begins."""
_WORD_START = re.compile(f"(?<=[^{SPACE}])(?={SPACE})")


@dataclass(frozen=True)
class Corpus:
    """Texts, read anew each time they are gone through, and no further than the budget and `max_rows` of the data go.

    Args:
        data: where they are.
        budget: UTF-8 bytes after which reading stops; None reads all.
    """

    data: DataSettings
    budget: int | None = None

    def texts(self) -> Iterator[str]:
        """The texts in order, the last one cut where the budget ends.

        Raises:
            InputError: a file is no UTF-8 text, or holds zero bytes; there is no text at all.
            UsageError: the files have no column of text.
        """
        return (str(row.values[TEXT]) for row in self.rows())

    def named_texts(self) -> Iterator[tuple[str, str]]:
        """As `texts`, each with the name of its file."""
        names = self._names()
        return ((names[row.place.file], str(row.values[TEXT])) for row in self.rows())

    def rows(self, bad: BadRows | None = None) -> Iterator[Row]:
        """As `texts`, each as the column `readers.TEXT` of a row.

        Args:
            bad: gets the rows that cannot be used.
        """
        left, found = self.budget, False
        rows = self._rows(BadRows(self.data.max_bad_rows) if bad is None else bad)
        for row in islice(rows, self.data.max_rows):
            text = str(row.values[TEXT])
            data = text if left is None else text.encode()[:left].decode(errors="ignore")
            if data:
                found = True
                yield Row({TEXT: data}, row.place)
            if left is not None and (left := left - len(data.encode())) <= 0:
                return
        if not found:
            raise InputError("the corpus has no text", where=", ".join(self.data.sources), remedy="give more data")

    def _rows(self, bad: BadRows) -> Iterator[Row]:
        pieces = None if self.data.max_rows else _FILE_CHARACTERS  # a row that is counted is whole
        for source in self.data.sources:
            columns, file = None, None
            for row in read_rows(source, self.data, bad, piece_characters=pieces):
                if columns is None or row.place.file != file:
                    columns = find_columns(row.values, where=row.place, kind="text", given=self.data.columns)
                    file = row.place.file
                try:
                    record = columns.record(row)
                except InputError as error:
                    bad.add(row.place, error)
                    continue
                assert isinstance(record, Text)
                if "\0" in record.text:
                    raise InputError("is not text: it holds a zero byte", where=row.place, remedy="give plain text")
                yield Row({TEXT: record.text}, row.place)

    def _names(self) -> dict[str, str]:
        """Names of the files by their paths, each another; a data set that is no file goes by its last part."""
        return distinct_names(
            label for source in self.data.sources for label in (list(map(str, files_of(source))) or [source])
        )

    def by_file(self, nbytes: int, most: int) -> dict[str, str]:
        """The beginnings of the first files, by their names; none for what is no file, such as a hub id."""
        paths = [path for source in self.data.sources for path in files_of(source)][:most]
        one = {path: Corpus(self.data.model_copy(update={"source": str(path)}), nbytes) for path in paths}
        names = self._names()
        return {names[str(path)]: "\n".join(corpus.texts()) for path, corpus in one.items()}

    def summary(self) -> dict[str, Any]:
        """SHA-256 by the name of each file."""
        from regraft.core.checkpoint import FileRef

        paths = [path for source in self.data.sources for path in files_of(source)]
        names = self._names()
        return {names[str(path)]: FileRef(path=path).sha256() for path in paths}


def count_words(
    texts: Iterable[str], old: TokenizerFile, *, tell: Callable[[int], None] | None = None
) -> Counter[Word]:
    """How often each word stands in the texts, as the tokens that the model makes of it.

    Args:
        texts: raw.
        old: whose normaliser and pre-tokenizer cut the words, and whose model spells them. Without a pre-tokenizer
            a word begins at the mark of a space, as long as no token of the vocabulary spans words. Added tokens are
            matched before, see `verbatim`, so they are no part of any word.
        tell: called with the number of characters read so far.
    """
    tokenizer = old.backend()
    marked = old.spelling == "pieces" and not old.spans_words
    outside = between(old, tokenizer)
    pieces: Counter[str] = Counter()
    read = 0
    for text in texts:
        for part in _parts(text):
            for normal in outside(part):
                pieces.update(_cut(normal, tokenizer, marked))
            read += len(part)
            if tell is not None:
                tell(read)
    words: Counter[Word] = Counter()
    for piece, count in sorted(pieces.items()):
        word = tuple(token.value for token in tokenizer.model.tokenize(piece))
        if word:
            words[word] += count
    return words


def _parts(text: str) -> Iterator[str]:
    """Parts of some thousand characters that begin at the beginning of a line that is not indented."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        found = re.compile(r"\n(?=\S)").search(text, start + _PIECE_CHARACTERS)
        if found is None:
            break
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _cut(normal: str, tokenizer: Tokenizer, marked: bool) -> Iterator[str]:
    """Words, in the alphabet of the model."""
    if tokenizer.pre_tokenizer is not None:
        pieces: Iterable[str] = (piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    else:
        pieces = [normal]
    for piece in pieces:
        yield from _WORD_START.split(piece) if marked else (piece,)
