# ruff: noqa: E501 - messages stand here as they are printed
"""What is said about invalid recipes, word for word: of which file, line and key, and what to do."""

from pathlib import Path

import pytest

from regraft.core.errors import PluginError
from tests.core.recipe.texts import BASE, MERGE


@pytest.mark.parametrize(
    "size", ['"5G"', '"5"', '"GB"', '"-1GB"', '"0GB"', "0", "5e9", "true", '"0.1B"', '"1 EB"', '"٣GB"', "[1]"]
)
def test_no_shard_sizes(problems, size):
    (message,) = problems(f"output.shard_size = {size}\n{BASE}{MERGE}")
    assert message.startswith(
        'r.toml:1:8: output.shard_size: expected a size such as "5GB", "500MB" or "2GiB", or a number of bytes, found '
    )


NOTHING = "the recipe does nothing: it has no steps, and [output] keeps the weights as they are"
SNAPSHOTS = {
    "nothing to do": (
        BASE,
        [f"r.toml:1:1: {NOTHING} (add a [[steps]] table, or set [output] dtype, quantize or shard_size)"],
    ),
    "nothing at all": (
        "seed = 1",
        ['r.toml:1:1: base: missing; a recipe starts from a checkpoint (add [base] with model = "...")'],
    ),
    "no model": (
        '[base]\nrevision = "x"',
        [
            "r.toml:1:2: base.model: missing; expected a model (a folder, a .safetensors or .gguf file, or a hub id) (add model = ...)"
        ],
    ),
    "misplaced and mistyped keys": (
        'nmae = "x"\nname = "a b"\nmodel = "x"\ndtype = "keep"\n[bse]\nmodel = "x"\n[output]\nseed = 3\nuse = "x"\nx = 1\n[[step]]\nuse = 1\n',
        [
            'r.toml:1:1: nmae: unknown key (did you mean "name"?)',
            'r.toml:2:1: name: expected a name of letters, digits, - _ and ., with a letter or digit first, found "a b"',
            "r.toml:3:1: model: unknown key (it belongs under [base])",
            "r.toml:4:1: dtype: unknown key (it belongs under [output])",
            'r.toml:5:2: bse: unknown key (did you mean "base"?)',
            "r.toml:8:1: output.seed: unknown key (it belongs at the top of the file, above the first [table])",
            "r.toml:9:1: output.use: unknown key (it belongs in a [[steps]] table)",
            "r.toml:10:1: output.x: unknown key (known keys: path, dtype, shard_size, format, quantize, minimum_cosine, digest, verify)",
            'r.toml:11:3: step: unknown key (did you mean "steps"?)',
        ],
    ),
    "wrong types": (
        'seed = 1.0\nbase = "x"\noutput = []\nsteps = 3\nname = ""',
        [
            "r.toml:1:1: seed: expected an integer of at least 0, found 1.0",
            'r.toml:2:1: base: expected a table, found "x"',
            "r.toml:3:1: output: expected a table, found an empty array",
            "r.toml:4:1: steps: expected an array of tables, found 3",
            'r.toml:5:1: name: expected a name of letters, digits, - _ and ., with a letter or digit first, found ""',
        ],
    ),
    "numbers": (
        "seed = 0xffffffffffffffffff\n" + BASE + MERGE + "scale = nan\n",
        [
            "r.toml:1:1: seed: the integer is too large (integers have at most 64 bits)",
            "r.toml:7:1: steps[0].scale: expected a finite number, found nan",
        ],
    ),
    "base and output": (
        '[base]\nmodel = 3\nrevison = "x"\nrevision = ""\ntrust_remote_code = 1\n[output]\npath = 3\ndtype = "bf16"\nquantize = "nf5"\nverify = "loda"\ndigest = 2024-01-01\n'
        + MERGE,
        [
            "r.toml:2:1: base.model: expected a model (a folder, a .safetensors or .gguf file, or a hub id), found 3",
            'r.toml:3:1: base.revison: unknown key (did you mean "revision"?)',
            'r.toml:4:1: base.revision: expected a string that is not empty, found ""',
            "r.toml:5:1: base.trust_remote_code: expected true or false, found 1",
            "r.toml:7:1: output.path: expected a path, found 3",
            'r.toml:8:1: output.dtype: expected one of "keep", "bfloat16", "float16" or "float32", found "bf16"',
            'r.toml:9:1: output.quantize: expected one of "keep", "none", "nf4" or "int8", found "nf5" (did you mean "nf4"?)',
            'r.toml:10:1: output.verify: expected one of "structure", "load" or "forward", found "loda" (did you mean "load"?)',
            'r.toml:11:1: output.digest: expected one of "xxh3", "sha256" or "none", found 2024-01-01',
        ],
    ),
    "which transformation": (
        BASE
        + '[[steps]]\nuse = "lofti"\n[[steps]]\nuse = "rope"\n[[steps]]\nuse = 3\n[[steps]]\n[[steps]]\nuses = "lofit"\n[[steps]]\nuse = "fourier-haed"\n',
        [
            'r.toml:4:1: steps[0].use: there is no transformation "lofti" (did you mean "lofit"? installed: context-extension, lofit, lora-merge)',
            'r.toml:6:1: steps[1].use: there is no transformation "rope" (installed: context-extension, lofit, lora-merge)',
            "r.toml:8:1: steps[2].use: expected the name of a transformation, found 3 (installed: context-extension, lofit, lora-merge)",
            "r.toml:9:3: steps[3].use: missing; expected the name of a transformation (add use = ...; installed: context-extension, lofit, lora-merge)",
            'r.toml:11:1: steps[4].uses: unknown key (did you mean "use"?)',
            'r.toml:13:1: steps[5].use: there is no transformation "fourier-haed" (did you mean "fourier-head"? installed: context-extension, lofit, lora-merge)',
        ],
    ),
    "one bracket": (
        BASE + '[steps]\nuse = "lofit"\n',
        [
            "r.toml:3:2: steps: expected an array of tables, found a table (write [[steps]], with two brackets, for each step)"
        ],
    ),
    "steps that are no tables": (
        'steps = ["lofit",\n  3]\n' + BASE,
        [
            'r.toml:1:10: steps[0]: expected a table with `use`, found "lofit"',
            "r.toml:2:3: steps[1]: expected a table with `use`, found 3",
        ],
    ),
    "ids": (
        BASE
        + MERGE
        + MERGE
        + MERGE.replace("use", 'id = "a"\nuse')
        + MERGE.replace("use", 'id = "a"\nuse')
        + MERGE.replace("use", 'id = "a b"\nuse')
        + MERGE.replace("use", 'id = "output"\nuse')
        + MERGE.replace("use", "id = 3\nuse"),
        [
            'r.toml:7:1: steps[1].use: the id "lora-merge" is taken by steps[0] in line 4 of r.toml (add an id of its own: id = "lora-merge-2")',
            'r.toml:14:1: steps[3].id: the id "a" is taken by steps[2] in line 10 of r.toml (choose another id)',
            'r.toml:18:1: steps[4].id: expected letters, digits, - and _, with a letter or digit first, found "a b" (choose another id)',
            'r.toml:22:1: steps[5].id: "output" is a top-level key, so no step can have it as its id (choose another id)',
            "r.toml:26:1: steps[6].id: expected letters, digits, - and _, with a letter or digit first, found 3 (choose another id)",
        ],
    ),
    "parameters": (
        BASE
        + '[[steps]]\nuse = "context-extension"\ntarget_length = "16k"\nmethod = "entropyabf"\ntheta = 0\nlayers = ["x", 2, true]\nratio = [1]\nlimits = { a = "b" }\n'
        + '[[steps]]\nid = "b"\nuse = "context-extension"\ntarget_lenght = 1\ntheta = 1e9\nlayers = "al"\nratio = [1, "x"]\nlimits = 3\nrope = 1\n'
        + '[[steps]]\nid = "c"\nuse = "context-extension"\n',
        [
            'r.toml:5:1: steps[0].target_length: expected an integer of at least 1, found "16k"',
            'r.toml:6:1: steps[0].method: expected one of "entropy-abf", "abf" or "yarn", found "entropyabf" (did you mean "entropy-abf"?)',
            "r.toml:7:1: steps[0].theta: expected a number greater than 0 and less than 1000000000.0, found 0",
            'r.toml:8:11: steps[0].layers[0]: expected an integer, found "x"',
            "r.toml:8:19: steps[0].layers[2]: expected an integer, found true",
            "r.toml:9:1: steps[0].ratio: expected an array of 2 values, found an array of 1 value",
            'r.toml:10:12: steps[0].limits.a: expected an integer, found "b"',
            'r.toml:14:1: steps[1].target_lenght: unknown key (did you mean "target_length"?)',
            "r.toml:15:1: steps[1].theta: expected a number greater than 0 and less than 1000000000.0, found 1000000000.0",
            'r.toml:16:1: steps[1].layers: expected an array of integers or "all", found "al" (did you mean "all"?)',
            'r.toml:17:13: steps[1].ratio[1]: expected a number, found "x"',
            "r.toml:18:1: steps[1].limits: expected a table, found 3",
            "r.toml:19:1: steps[1].rope: unknown key (known keys: target_length, method, theta, window, layers, ratio, limits)",
            "r.toml:20:3: steps[2].target_length: missing; expected an integer of at least 1 (add target_length = ...)",
        ],
    ),
    "unions": (
        BASE
        + '[[steps]]\nuse = "lofit"\ndata = "x"\nselect = { kind = "scale", heads = 0, z = 1 }\ntune = { kind = "gradeint" }\n'
        + '[[steps]]\nid = "b"\nuse = "lofit"\ndata = 3\nselect = 3\ntune = {}\n'
        + '[[steps]]\nid = "c"\nuse = "lofit"\ndata = ""\nselect.kind = "gradient"\ntune = { kind = "gradient", lr = "x", lrr = 1 }\ncorpus = 3\nextra = ["", 1]\n',
        [
            "r.toml:6:28: steps[0].select.heads: expected an integer of at least 1, found 0",
            "r.toml:6:39: steps[0].select.z: unknown key (known keys: kind, heads)",
            'r.toml:7:10: steps[0].tune.kind: expected one of "scale" or "gradient", found "gradeint" (did you mean "gradient"?)',
            "r.toml:11:1: steps[1].data: expected a path, found 3",
            "r.toml:12:1: steps[1].select: expected a table, found 3",
            'r.toml:13:1: steps[1].tune.kind: missing; expected one of "scale" or "gradient" (add kind = ...)',
            "r.toml:17:1: steps[2].data: expected a path, found an empty string",
            "r.toml:18:1: steps[2].select.lr: missing; expected a number (add lr = ...)",
            'r.toml:19:29: steps[2].tune.lr: expected a number, found "x"',
            'r.toml:19:39: steps[2].tune.lrr: unknown key (did you mean "lr"?)',
            'r.toml:20:1: steps[2].corpus: expected a path or "demo", found 3',
            "r.toml:21:10: steps[2].extra[0]: expected a path, found an empty string",
            "r.toml:21:14: steps[2].extra[1]: expected a path, found 1",
        ],
    ),
    "a plugin's own words": (
        BASE + '[[steps]]\nuse = "context-extension"\ntarget_length = 16\n',
        ["r.toml:3:3: steps[0]: window is longer than target_length"],
    ),
    "files and folders": (
        BASE + MERGE + 'table = "no.csv"\nfolder = "r.toml"\n',
        [
            'r.toml:6:1: steps[0].table: there is no file "no.csv"',
            'r.toml:7:1: steps[0].folder: there is no folder "r.toml"',
        ],
    ),
    "keys in quotes, values over several lines": (
        BASE + '[[steps]]\nuse = "lora-merge"\nadapter = """\nx"""\n"no key" = 1\n"" = 2\n',
        [
            'r.toml:7:1: steps[0]."no key": unknown key (known keys: adapter, table, folder, scale)',
            'r.toml:8:1: steps[0]."": unknown key (known keys: adapter, table, folder, scale)',
        ],
    ),
}


@pytest.mark.parametrize("case", SNAPSHOTS)
def test_messages(problems, case):
    text, messages = SNAPSHOTS[case]
    assert problems(text) == messages


def test_windows_line_ends_and_long_values(problems):
    text = (BASE + '[[steps]]\nuse = "lora-merge"\nadapter = "x"\nscale = "%s"\n' % ("é\t" * 50)).replace("\n", "\r\n")
    (message,) = problems(text)
    assert message == 'r.toml:6:1: steps[0].scale: expected a number, found "' + "é\\t" * 28 + 'é..."'


def test_errors_in_what_is_inherited_name_its_file(problems):
    Path("sub").mkdir()
    Path("sub/parent.toml").write_text(
        "sed = 1\n" + BASE + 'revisoin = "x"\n[output]\ndtype = 3\n' + MERGE + "scal = 1\n"
    )
    assert problems('seeed = 1\nextends = "sub/parent.toml"\n[output]\ndigest = 1\n') == [
        'r.toml:1:1: seeed: unknown key (did you mean "seed"?)',
        'r.toml:4:1: output.digest: expected one of "xxh3", "sha256" or "none", found 1',
        'sub/parent.toml:1:1: sed: unknown key (did you mean "seed"?)',
        'sub/parent.toml:4:1: base.revisoin: unknown key (did you mean "revision"?)',
        'sub/parent.toml:6:1: output.dtype: expected one of "keep", "bfloat16", "float16" or "float32", found 3',
        'sub/parent.toml:10:1: steps[0].scal: unknown key (did you mean "scale"?)',
    ]


def test_broken_plugins(load, problems):
    text = BASE + '[[steps]]\nuse = "fourier-head"\nbins = 3\n'
    with pytest.raises(PluginError) as caught:
        load(text)
    assert str(caught.value) == (
        'r.toml:4:1: steps[0].use: the plugin "fourier-head" is broken\n'
        "  found: ImportError: no module named fourier\n"
        "  remedy: repair or reinstall the plugin; `regraft plugins` lists all of them"
    )
    assert caught.value.exit_code == 5
    assert problems(text + MERGE.replace("adapter", "adaptr")) == [
        'r.toml:4:1: steps[0].use: the plugin "fourier-head" is broken: ImportError: no module named fourier (repair or reinstall the plugin; `regraft plugins` lists all of them)',
        'r.toml:8:1: steps[1].adaptr: unknown key (did you mean "adapter"?)',
    ]
