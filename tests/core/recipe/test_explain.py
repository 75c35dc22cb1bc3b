# ruff: noqa: E501 - messages stand here as they are printed
"""pydantic's errors in plain words, for every kind of field that a plugin is likely to have."""

import datetime
import enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from regraft.core.recipe.explain import validate
from regraft.core.recipe.wording import key_text


class Mode(enum.Enum):
    FAST = "fast"
    EXACT = "exact"


def even(value: int) -> int:
    if value % 2:
        raise PydanticCustomError("odd", "Expected an even number of {what}", {"what": "heads"})
    return value


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int
    deeper: "Inner | None" = None


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")
    low: int = Field(1, le=8)
    between: int = Field(1, ge=1, le=8)
    multiple: int = Field(8, multiple_of=8)
    share: float = Field(0.5, ge=0, lt=1)
    word: str = Field("abc", min_length=2, max_length=5)
    short: str = Field("a", max_length=1)
    pattern: str = Field("a1", pattern="^[a-z][0-9]$")
    day: datetime.date = datetime.date(2024, 1, 1)
    mode: Mode = Mode.FAST
    at_least: list[str] = Field(["a"], min_length=1)
    exactly: list[int] = Field([1, 2], min_length=2, max_length=2)
    mixed: list[int | str] = []
    groups: list[list[int]] = []
    by_layer: dict[int, float] = {}
    named: dict[str, int] = Field({"a": 1, "b": 2}, min_length=2)
    heads: Annotated[int, AfterValidator(even)] = 2
    number: int | float | Literal["auto"] = 1
    several: Literal["a", "b"] | int | bool = 1
    layers: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] = 1
    aliased: int = Field(1, alias="lambda")
    inner: Inner | None = None
    anything: Any = None
    not_this: str = "x"

    @field_validator("not_this")
    @classmethod
    def refuse(cls, value):
        if value == "y":
            raise AssertionError
        if value == "z":
            raise ValueError("z is not\n  supported yet")
        return value


CASES = [
    ({"low": 9}, "low: expected an integer of at most 8, found 9"),
    ({"between": 0}, "between: expected an integer from 1 to 8, found 0"),
    ({"multiple": 12}, "multiple: expected an integer that is a multiple of 8, found 12"),
    ({"share": 1}, "share: expected a number of at least 0 and less than 1, found 1"),
    ({"word": "a"}, 'word: expected a string of 2 to 5 characters, found "a"'),
    ({"short": "ab"}, 'short: expected a string of at most 1 characters, found "ab"'),
    ({"pattern": "x"}, 'pattern: expected a string like ^[a-z][0-9]$, found "x"'),
    ({"pattern": 1}, "pattern: expected a string like ^[a-z][0-9]$, found 1"),
    ({"day": "soon"}, 'day: expected a date, found "soon"'),
    ({"day": datetime.time(1, 2)}, "day: expected a date, found 01:02:00"),
    ({"mode": "exat"}, 'mode: expected one of "fast" or "exact", found "exat" (did you mean "exact"?)'),
    ({"at_least": []}, "at_least: expected an array of at least 1 strings, found an empty array"),
    ({"exactly": [1]}, "exactly: expected an array of 2 integers, found an array of 1 value"),
    ({"exactly": 1}, "exactly: expected an array of 2 integers, found 1"),
    ({"mixed": 1}, "mixed: expected an array, found 1"),
    ({"mixed": [1, "a", 2.5]}, "mixed[2]: expected an integer or a string, found 2.5"),
    ({"groups": 1}, "groups: expected an array of arrays, found 1"),
    ({"groups": [[1], [2, "x"]]}, 'groups[1][1]: expected an integer, found "x"'),
    ({"by_layer": {"1": "x"}}, 'by_layer.1: expected a number, found "x"'),
    ({"by_layer": {"x": 1}}, "by_layer.x: not a key that this table takes: expected a valid integer, unable to parse string as an integer"),
    ({"named": {"a": 1}}, "named: expected a table of at least 2 keys, found a table"),
    ({"heads": 3}, "heads: expected an even number of heads"),
    ({"number": "auot"}, 'number: expected an integer, a number or "auto", found "auot" (did you mean "auto"?)'),
    ({"several": 1.5}, 'several: expected an integer or true or false, or one of "a" or "b", found 1.5'),
    ({"layers": 0}, "layers: expected an integer of at least 1 or an array of integers, found 0"),
    ({"layers": [1, 0]}, "layers[1]: expected an integer of at least 1, found 0"),
    ({"layers": [1, "x"]}, 'layers[1]: expected an integer of at least 1, found "x"'),
    ({"lambda": "x"}, 'lambda: expected an integer, found "x"'),
    ({"aliased": 1}, "aliased: unknown key"),
    ({"inner": {"depth": 1, "deeper": {"dpth": 2}}}, 'inner.deeper.dpth: unknown key (did you mean "depth"?)'),
    ({"inner": {"depth": 1, "deeper": 3}}, "inner.deeper: expected a table, found 3"),
    ({"not_this": "y"}, "not_this: this value is not accepted"),
    ({"not_this": "z"}, "not_this: z is not supported yet"),
]  # fmt: skip


def printed(fault):
    text = f"{key_text(fault.path)}: {fault.message}"
    return f"{text} ({fault.remedy})" if fault.remedy else text


@pytest.mark.parametrize(("data", "message"), CASES, ids=[message.partition(" (")[0] for _, message in CASES])
def test_message(data, message):
    instance, faults = validate(Fields, data, data)
    assert instance is None
    assert printed(faults[0]).startswith(message)


def test_a_valid_value_has_no_faults():
    day = datetime.date(2024, 2, 3)
    data = {"day": day, "lambda": 3, "share": 0, "mode": "exact", "by_layer": {"3": 1}, "anything": {"a": [1]}}
    instance, faults = validate(Fields, data, data)
    assert faults == []
    assert (instance.day, instance.aliased, instance.mode, instance.by_layer) == (day, 3, Mode.EXACT, {3: 1.0})


@pytest.mark.parametrize("data", [{"low": "1"}, {"low": True}, {"low": 1.0}, {"share": "0.5"}, {"word": 12}])
def test_nothing_is_converted_behind_the_users_back(data):
    assert validate(Fields, data, data)[0] is None


def test_a_missing_key_that_is_mistyped_is_one_fault():
    data = {"inner": {"detph": 1}}
    assert [printed(fault) for fault in validate(Fields, data, data)[1]] == [
        'inner.detph: unknown key (did you mean "depth"?)'
    ]


def test_members_that_share_a_name_with_a_key():
    class Scale(BaseModel):
        kind: Literal["scale"]
        scale: int

    class Shift(BaseModel):
        kind: Literal["shift"]
        scale: dict[str, int]

    class Both(BaseModel):
        select: Annotated[Scale | Shift, Field(discriminator="kind")]

    for data, message in (
        ({"kind": "scale", "scale": "x"}, 'select.scale: expected an integer, found "x"'),
        ({"kind": "shift", "scale": {"shift": "x"}}, 'select.scale.shift: expected an integer, found "x"'),
        ({"kind": "shift"}, "select.scale: missing; expected a table (add scale = ...)"),
    ):
        (fault,) = validate(Both, {"select": data}, {"select": data})[1]
        assert printed(fault) == message


def test_a_union_that_a_function_tells_apart():
    def which(value):
        return "number" if isinstance(value, int) else None

    class Chosen(BaseModel):
        value: Annotated[Annotated[int, Tag("number")] | Annotated[str, Tag("text")], Discriminator(which)]

    (fault,) = validate(Chosen, {"value": 1.5}, {"value": 1.5})[1]
    assert printed(fault) == "value: unable to extract tag using discriminator which()"


def test_messages_show_what_was_written():
    class Files(BaseModel):
        path: Annotated[Path, Field(max_length=3)] | int

    (fault,) = validate(Files, {"path": 1.5}, {"path": "as written"})[1]
    assert fault.message == 'expected a path or an integer, found "as written"'
