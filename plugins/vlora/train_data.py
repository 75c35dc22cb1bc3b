"""Image-text data: sequences of tokens, the picture that each row names, and the steps in which both are learnt.

A row is a prompt with its answer, or a chat, with a key `image` (a path below `images`, or below the folder of the data
file) or `features` (the name of a tensor of precomputed features). A row with neither is text alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from regraft.core.data.batches import Batch, Batches
from regraft.core.data.load import Dataset, files_of, prepare, read_rows
from regraft.core.data.records import find_columns
from regraft.core.data.rows import BadRows, Place, Row
from regraft.core.data.settings import DataSettings
from regraft.core.errors import InputError, UsageError
from regraft.core.jsonio import brief

if TYPE_CHECKING:
    import torch

IMAGE, FEATURES = "image", "features"
"""Keys of a row."""
_KINDS = ("completion", "chat")


@dataclass(frozen=True)
class Picture:
    """What a row shows.

    Args:
        key: path of the image, or name of the tensor of features.
        image: which of the two.
    """

    key: str
    image: bool


Check = Callable[[Picture], str]
"""Looks at a picture before anything is learnt: SHA-256 of what it holds. Raises InputError."""


@dataclass(frozen=True)
class ShownData:
    """Sequences, each with its picture.

    Args:
        dataset: the sequences.
        pictures: every picture once, in the order of the data.
        shown: of each sequence the number of its picture; -1 for text alone.
        digests: SHA-256 of each picture.
    """

    dataset: Dataset
    pictures: tuple[Picture, ...]
    shown: tuple[int, ...]
    digests: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the pictures, and of which sequence shows which."""
        return hashlib.sha256(repr((self.digests, self.shown)).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """For a patch's metrics."""
        alone = self.shown.count(-1)
        return {**self.dataset.summary(), "pictures": len(self.pictures), "pictures_digest": self.digest,
                "sequences_without_picture": alone}  # fmt: skip


def check_files(settings: DataSettings) -> None:
    """Whether the data files are there, and are files; reads none of them.

    Raises:
        UsageError: a path that leads nowhere, or a source that only the `datasets` library opens.
    """
    for source in settings.sources:
        if not files_of(source):
            raise UsageError(
                "image-text data comes from files, beside which the images stand",
                where=f"data: {source}",
                expected="a .jsonl file, or a folder of such files",
                remedy="write the rows to a .jsonl file",
            )


@dataclass
class _Reader:
    """Rows on their way to the encoder; notes what each shows."""

    settings: DataSettings
    images: Path | None
    placeholder: str
    check: Check
    bad: BadRows
    pictures: dict[Picture, str] = field(default_factory=dict)
    shown: dict[Place, Picture] = field(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        file = None
        for source in self.settings.sources:
            for row in read_rows(source, self.settings, self.bad):
                if row.place.file != file:
                    file = row.place.file
                    self._check_kind(row)
                try:
                    picture = self._picture(row)
                except InputError as error:
                    self.bad.add(row.place, error)
                    continue
                if picture is not None:
                    self.shown[row.place] = picture
                    row = Row(_without(row.values, self.placeholder), row.place)
                yield row

    def _check_kind(self, row: Row) -> None:
        columns = find_columns(row.values, where=row.place, kind=self.settings.kind, given=self.settings.columns)
        if columns.kind not in _KINDS:
            raise UsageError(
                "the rows have no answers, and answers are what is learnt",
                where=row.place,
                expected="a prompt and an answer, or messages",
                found=f"columns {brief(', '.join(row.values))}",
                remedy='for captions without a question write {"prompt": "", "answer": "..."}',
            )

    def _picture(self, row: Row) -> Picture | None:
        image, features = row.values.get(IMAGE), row.values.get(FEATURES)
        if image is not None and features is not None:
            raise InputError("has both an image and features", expected="one of them")
        if image is None and features is None:
            return None
        value = features if image is None else image
        if not isinstance(value, str) or not value:
            key = FEATURES if image is None else IMAGE
            wanted = "the name of one tensor" if image is None else "the path of one image"
            raise InputError(f"{key} is no text", expected=wanted, found=brief(value))
        picture = Picture(value, False) if image is None else Picture(self._path(value, row.place), True)
        if picture not in self.pictures:
            self.pictures[picture] = self.check(picture)
        return picture

    def _path(self, value: str, place: Place) -> str:
        inside = PurePosixPath(value.replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts or "\0" in value:
            raise InputError("image leads outside of the folder of images", expected="a relative path", found=value)
        path = (self.images or Path(place.file).parent) / value
        if not path.is_file():
            raise InputError("there is no such image", expected="a file", found=str(path))
        return str(path)


def load_shown(
    settings: DataSettings,
    tokenizer: Any,
    *,
    window: int,
    check: Check,
    images: Path | None = None,
    placeholder: str = "",
    seed: int = 0,
) -> ShownData:
    """Read and tokenise image-text rows.

    Args:
        settings: of the data.
        tokenizer: of the checkpoint.
        window: tokens that the model's positions allow.
        check: looks at every picture once.
        images: folder at which paths of images start; None takes that of the data file.
        placeholder: removed from the texts of rows with a picture, with one line break beside it; "" for none.
        seed: of the draw that `max_rows` asks for.

    Raises:
        InputError: data or pictures cannot be read, too many rows are bad, or nothing is left.
        UsageError: the rows have no answers; or as `load_data`.
    """
    from regraft.core.checkpoint import FileRef

    reader = _Reader(settings, images, placeholder, check, BadRows(settings.max_bad_rows))
    files = {str(path): FileRef(path=path).sha256() for source in settings.sources for path in files_of(source)}
    dataset = prepare(
        reader.rows(), settings, tokenizer, window=window, seed=seed, bad=reader.bad, files=files
    )  # fmt: skip
    pictures = [reader.shown.get(example.place) for example in dataset.examples]
    kept = list(dict.fromkeys(picture for picture in pictures if picture is not None))
    numbers = {picture: number for number, picture in enumerate(kept)}
    shown = tuple(-1 if picture is None else numbers[picture] for picture in pictures)
    return ShownData(dataset, tuple(kept), shown, tuple(reader.pictures[picture] for picture in kept))


def _without(value: Any, placeholder: str) -> Any:
    """`value` without the placeholder in any text of it."""
    if not placeholder:
        return value
    if isinstance(value, str):
        for form in (f"{placeholder}\n", f"\n{placeholder}", placeholder):
            value = value.replace(form, "")
        return value
    if isinstance(value, Mapping):
        return {key: _without(one, placeholder) for key, one in value.items()}
    return [_without(one, placeholder) for one in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class ShownBatch:
    """Sequences that are computed at once, and the pictures that they show, each picture once.

    Args:
        batch: B rows of tokens.
        pictures: M of them; none where no row shows one.
        rows: [B] number of each row's picture, 0 to M - 1; -1 for text alone.
    """

    batch: Batch
    pictures: tuple[Picture, ...]
    rows: torch.Tensor

    @property
    def indices(self) -> tuple[int, ...]:
        """Which examples."""
        return self.batch.indices

    @property
    def tokens(self) -> int:
        """Without padding."""
        return self.batch.tokens


@dataclass(frozen=True)
class ShownBatches:
    """The steps of a training on image-text data."""

    data: ShownData
    batches: Batches

    @property
    def rank(self) -> int:
        """This process."""
        return self.batches.rank

    @property
    def world(self) -> int:
        """How many processes there are."""
        return self.batches.world

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.batches)

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.batches.per_epoch

    def units(self, step: int) -> int:
        """Learnt tokens of the step."""
        return self.batches.units(step)

    def micro(self, step: int, device: str = "cpu") -> list[ShownBatch]:
        """What this process computes in a step, piece by piece."""
        return [self._shown(batch) for batch in self.batches.micro(step, device)]

    def places(self, indices: Sequence[int]) -> Sequence[Place]:
        """Where examples come from."""
        return self.batches.places(indices)

    def identity(self) -> Mapping[str, Any]:
        """What decides the steps; JSON values."""
        return {**self.batches.identity(), "pictures": self.data.digest}

    def _shown(self, batch: Batch) -> ShownBatch:
        import torch

        numbers = [self.data.shown[index] for index in batch.indices]
        distinct = list(dict.fromkeys(number for number in numbers if number >= 0))
        rows = [distinct.index(number) if number >= 0 else -1 for number in numbers]
        pictures = tuple(self.data.pictures[number] for number in distinct)
        return ShownBatch(batch, pictures, torch.tensor(rows, device=batch.input_ids.device))
