"""How a fault is registered, and how one is made in the recipe `recipe.toml` or the checkpoint `base`."""

import json
from pathlib import Path

from tests.checkpoints import file_bytes
from tests.running import ABF, recipe_text

CASES = {}
FIRST = "model-00001-of-00006.safetensors"
INDEX = "model.safetensors.index.json"


def case(code, *arguments):
    """Register a function that arranges a fault; `arguments` replace `apply recipe.toml`."""

    def register(arrange):
        CASES[arrange.__name__] = (arrange, code, arguments or ("apply", "recipe.toml"))
        return arrange

    return register


def recipe(text=None, **output):
    """Write recipe.toml: `text`, or the plain one with these keys of [output]."""
    Path("recipe.toml").write_text(recipe_text("base", ABF, **{"path": "out", **output}) if text is None else text)


def edit(old, new):
    """The plain recipe with a change in its text."""
    text = recipe_text("base", ABF, path="out")
    assert old in text
    recipe(text.replace(old, new))


def edit_json(name, **changes):
    """Change keys of a JSON file of the base; None removes one."""
    path = Path("base", name)
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def zeros(*shape):
    import torch

    return torch.zeros(shape)


def edit_index(change):
    path = Path("base", INDEX)
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def header_of(path):
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def edit_header(change):
    """Change the header of the first shard; its bytes stay."""
    path = Path("base", FIRST)
    header, data = header_of(path)
    change(header)
    path.write_bytes(file_bytes(header, data))


def set_values(name, value, count=1):
    """Overwrite the first values of a tensor of the base."""
    import numpy as np

    shard = json.loads(Path("base", INDEX).read_text())["weight_map"][name]
    path = Path("base", shard)
    header, _ = header_of(path)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little") + header[name]["data_offsets"][0]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(np.full(count, value, dtype=np.float32).tobytes())


def failed(ran, code):
    """The command failed as documented, with one message and no result."""
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("error: ") == 1
    assert "Traceback" not in ran.err
    assert "unexpected" not in ran.err.splitlines()[0]
