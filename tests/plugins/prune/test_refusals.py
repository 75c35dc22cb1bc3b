"""What cannot be pruned is refused with the reason and what to do."""

import json
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from regraft.core.errors import InputError, RegraftError, Unsupported, UsageError
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.plugins.prune import Prune
from regraft.plugins.prune.params import PruneParams
from tests.checkpoints import write_checkpoint

DATA = {"source": "x.txt"}


def params(**keys):
    return PruneParams.model_validate_json(json.dumps(keys, default=str), strict=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "give `sparsity`, `pattern` or `skip_ffn`: without, nothing changes"),
        ({"sparsity": 0.0, "data": DATA}, "greater than 0"),
        ({"sparsity": 1.0, "data": DATA}, "less than 1"),
        ({"sparsity": 0.5, "pattern": "2:4", "data": DATA}, "give either `sparsity` or `pattern`"),
        ({"pattern": "4:4", "data": DATA}, "pattern 4:4 keeps everything: the first number must be the smaller one"),
        ({"pattern": "2/4", "data": DATA}, "should match pattern"),
        ({"sparsity": 0.5}, 'score = "wanda" needs either `data` or `tasks`'),
        ({"sparsity": 0.5, "data": DATA, "tasks": {"a": DATA, "b": DATA}}, "needs either `data` or `tasks`"),
        ({"sparsity": 0.5, "tasks": {"a": DATA}}, "at least 2 items"),
        ({"sparsity": 0.5, "tasks": {"a b": DATA, "c": DATA}}, "'a b' is no name of a task"),
        ({"sparsity": 0.5, "data": DATA, "combine": "mean"}, "combine is for several `tasks`: remove it"),
        ({"sparsity": 0.5, "score": "magnitude", "data": DATA}, 'data is for score = "wanda": remove it'),
        ({"sparsity": 0.5, "score": "magnitude", "batch_size": 2}, 'batch_size is for score = "wanda"'),
        ({"skip_ffn": {}, "layers": "1-"}, "layers has no effect without sparsity or pattern: remove it"),
        ({"skip_ffn": {"every": 0}}, "greater than or equal to 1"),
        ({"sparsity": 0.5, "data": {**DATA, "kind": "preference"}}, "data: a preference pair is not one text"),
        ({"sparsity": 0.5, "data": DATA, "roles": ["lm_head"]}, "Input should be 'q_proj'"),
    ],
)
def test_keys_that_make_no_sense(keys, message):
    with pytest.raises(ValidationError, match=message):
        params(**keys)


def refused(kind, folder, *, run=False, **keys):
    checkpoint, given = open_folder(folder, label="base"), params(**keys)

    def attempt():
        if run:
            Prune().check(checkpoint, given)
            Prune().apply(checkpoint, given, Run("prune"))
        Prune().plan(checkpoint, given)

    with pytest.raises(kind) as caught:
        attempt()
    error: RegraftError = caught.value
    assert error.remedy
    return error.message, error.where, error.expected, error.found


def test_models_that_do_not_fit(tiny_folder):
    llama = tiny_folder("llama")
    assert refused(UsageError, llama, score="magnitude", sparsity=0.5, layers="1-4")[:2] == (
        "there are no such layers", "layers")  # fmt: skip
    assert refused(UsageError, llama, skip_ffn={"start": 2})[1:] == ("skip_ffn.start", "0 to 1", "2")
    whole = {"skip_ffn": {"every": 1}, "roles": ["up_proj"]}
    assert refused(UsageError, llama, **whole, score="magnitude", sparsity=0.5)[:2] == (
        "nothing is left to prune: the layers' MLPs are switched off whole", "skip_ffn")  # fmt: skip
    twice = Prune().plan(open_folder(llama, label="base"),
                         params(score="magnitude", sparsity=0.5, roles=["q_proj", "q_proj"]))  # fmt: skip
    assert any("of 2 matrices" in note for note in twice.notes), twice.notes
    assert refused(Unsupported, llama, score="magnitude", pattern="2:5") == (
        "a pattern of 5 needs a whole number of groups", "layers.0.q_proj", "a multiple of 5 inputs", "64")  # fmt: skip
    assert refused(Unsupported, llama, sparsity=0.01, data=DATA) == (
        "so little goes that nothing would: the result would be the base itself", "sparsity",
        "at least 1 of 96 inputs", "0.01")  # fmt: skip
    for family, place in (("mixtral", "layers.0.experts.0.gate_proj"), ("qwen3_moe", "layers.0.experts.0.gate_proj")):
        message, where, *_ = refused(Unsupported, tiny_folder(family), sparsity=0.5, data=DATA)
        assert "computes all experts at once" in message
        assert where == place
    message, *_ = refused(Unsupported, tiny_folder("gpt2"), score="magnitude", sparsity=0.5, roles=["gate_proj"])
    assert "stores gate_proj" in message


def test_attention_of_a_mixture_can_be_measured(tiny_folder, tmp_path):
    (tmp_path / "x.txt").write_text("some text\nand more")
    keys = {"sparsity": 0.5, "roles": ["q_proj", "o_proj"], "data": tmp_path / "x.txt"}
    patch = Prune().apply(open_folder(tiny_folder("mixtral"), label="base"), params(**keys), Run("prune"))
    assert patch.metrics["sparsity"] == 0.5
    assert len(patch.edits) == 4


def test_data_that_are_not_there_or_cannot_be_used(tiny_folder, tmp_path):
    llama = tiny_folder("llama")
    assert refused(UsageError, llama, run=True, sparsity=0.5, data=tmp_path / "none.txt")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    assert refused(UsageError, llama, run=True, sparsity=0.5, data=pairs)[:2] == (
        "a preference pair is not one text", "data")  # fmt: skip
    (tmp_path / "empty.txt").write_text("")
    assert refused(InputError, llama, run=True, sparsity=0.5, data=tmp_path / "empty.txt")


def test_inputs_that_are_not_finite(tiny_folder, tmp_path):
    checkpoint = open_folder(tiny_folder("llama"), label="base")
    tensors = {name: tensor.load().clone() for name, tensor in checkpoint.tensors.items()}
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.inf
    files = {name: file.read() for name, file in checkpoint.files.items() if name != "config.json"}
    broken = write_checkpoint(tmp_path / "broken", tensors, config=checkpoint.config, files=files)
    (tmp_path / "x.txt").write_text("some text")
    message, where, _, found = refused(InputError, broken, run=True, sparsity=0.5, data=tmp_path / "x.txt")
    assert message == "an input of a projection is not finite"
    assert where == "model.layers.0.mlp.down_proj.weight"
    assert found == "NaN or Inf in 1 of 96 inputs"


def test_a_plan_imports_no_torch(tiny_folder):
    code = (
        "import sys\nfrom pathlib import Path\nfrom regraft.core.sources.folder import open_folder\n"
        "from regraft.plugins.prune import Prune\nfrom regraft.plugins.prune.params import PruneParams\n"
        "given = PruneParams(sparsity=0.5, data={'source': 'x'}, skip_ffn={})\n"
        "Prune().plan(open_folder(Path(sys.argv[1]), label='base'), given)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tiny_folder("llama"))], check=False).returncode == 0
