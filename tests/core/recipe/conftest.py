"""Sample transformations, and recipes from text."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, BeforeValidator, ConfigDict, DirectoryPath, Field, FilePath, model_validator

from regraft.core.errors import RecipeError
from regraft.core.recipe.load import load_recipe
from regraft.core.recipe.references import ModelReference


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ByScale(Strict):
    kind: Literal["scale"]
    heads: int = Field(ge=1)


class ByGradient(Strict):
    kind: Literal["gradient"]
    lr: float


def tokens(value):
    return int(value[:-1]) * 1024 if isinstance(value, str) and value.endswith("k") else value


class Extension(Strict):
    target_length: int = Field(ge=1, description="Tokens.")
    method: Literal["entropy-abf", "abf", "yarn"] = "abf"
    theta: float = Field(default=1e4, gt=0, lt=1e9)
    window: Annotated[int, BeforeValidator(tokens)] = 2048
    layers: list[int] | Literal["all"] = "all"
    ratio: tuple[int, float] = (1, 1.0)
    limits: dict[str, int] = {}

    @model_validator(mode="after")
    def window_fits(self):
        if self.window > self.target_length:
            raise ValueError("window is longer than target_length")
        return self


class Model(Strict):
    model: ModelReference


class Lofit(Strict):
    data: Path
    corpus: Path | Literal["demo"] = "demo"
    label: str | Path | None = None
    place: Path | str | None = None
    models: list[ModelReference | Model] = []
    teacher: ModelReference | None = None
    extra: list[Path] = []
    select: ByScale | ByGradient | None = None
    tune: Annotated[ByScale | ByGradient, Field(discriminator="kind")] | None = None


class Merge(Strict):
    adapter: ModelReference
    table: FilePath | None = None
    folder: DirectoryPath | None = None
    scale: float = 1.0


class ExtensionMethod:
    summary = "Longer contexts."
    Params = Extension


class LofitMethod:
    Params = Lofit


class MergeMethod:
    Params = Merge


@pytest.fixture
def transformations():
    return {"context-extension": ExtensionMethod, "lofit": LofitMethod, "lora-merge": MergeMethod}


@pytest.fixture
def broken():
    return {"fourier-head": "ImportError: no module named fourier"}


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """The current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(inside, transformations, broken):
    """Write `text` to a file and load it."""

    def run(text, *overrides, file="r.toml"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(file, overrides, transformations, broken)

    return run


@pytest.fixture
def problems(load):
    """The printed problems of a recipe, one line each."""

    def run(text, *overrides, file="r.toml"):
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides, file=file)
        assert caught.value.exit_code == 2
        return [str(problem) for problem in caught.value.problems]

    return run
