"""Every parser of files that strangers make, as a function of bytes, with honest files to begin with.

The contract of each: bytes give a result, or one of `REFUSALS` with a message. Nothing else is raised, nothing is
written, and time and memory stay within bounds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from regraft.core.errors import InputError, RegraftError, Unsupported, UsageError
from tests.fuzz import mutations
from tests.fuzz.mutations import Pick

REFUSALS: tuple[type[RegraftError], ...] = (InputError, UsageError, Unsupported)
"""Exit codes 3, 2, and 1 for what is valid and not supported."""

Mutation = Callable[[bytes, Pick], bytes]


@dataclass(frozen=True)
class Target:
    """One parser.

    Args:
        name: of the format.
        read: parses bytes, as deeply as the product does before it computes anything.
        seeds: honest bytes.
        mutation: what suits the format.
    """

    name: str
    read: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    mutation: Mutation

    def survives(self, data: bytes) -> None:
        """Hold the parser to its contract."""
        try:
            self.read(data)
        except REFUSALS as error:
            if not error.message:
                raise
            str(error).encode("utf-8", "backslashreplace")  # as the command line prints it
            json.dumps(error.as_json(), default=str)


TARGETS: dict[str, Target] = {}


def target(mutation: Mutation, seeds: Callable[[], list[bytes]]) -> Callable[[Callable[[bytes], object]], Any]:
    """Register a function as a target of its own name."""

    def register(read: Callable[[bytes], object]) -> Callable[[bytes], object]:
        name = read.__name__.replace("_", "-")
        TARGETS[name] = Target(name, read, seeds, mutation)
        return read

    return register


@cache
def scratch() -> Path:
    """A folder that ends with the process, with honest files in it: see `base`."""
    folder = tempfile.TemporaryDirectory(prefix="regraft-fuzz-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[Any] = []


@cache
def base() -> Path:
    """A tiny checkpoint with a tokenizer, in shards, that nothing changes."""
    from tests.families import save_tiny

    return save_tiny("llama", scratch() / "base", shards="150KB", tokenizer=True)


@cache
def variant(name: str, *links: str) -> Path:
    """A folder with links to some files of the base, for one file that is fuzzed beside them."""
    folder = scratch() / name
    folder.mkdir()
    for file in base().iterdir():
        if not links or file.suffix in links:
            (folder / file.name).symlink_to(file)
    return folder


def put(path: Path, data: bytes) -> Path:
    """Write `data` in place of the file or link `path`."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def of_base(name: str) -> Callable[[], list[bytes]]:
    """The base's own file as a seed."""
    return lambda: [(base() / name).read_bytes()]


def document(value: Any) -> bytes:
    return json.dumps(value).encode()


# Checkpoints


def small_safetensors() -> list[bytes]:
    from tests.checkpoints import entry, file_bytes

    return [
        file_bytes({"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}, bytes(32)),
        file_bytes({"__metadata__": {"format": "pt"}, "a": entry("U8", [], 0, 1), "b": entry("F8_E4M3", [0, 5], 1, 1)},
                   bytes(1)),
    ]  # fmt: skip


@target(mutations.mutated_safetensors, small_safetensors)
def header(data: bytes) -> object:
    """A .safetensors file by name."""
    from regraft.core.sources import open_checkpoint

    folder = variant("header", ".nothing")
    (folder / "config.json").write_bytes(b"{}")
    checkpoint = open_checkpoint(put(folder / "model.safetensors", data))
    return checkpoint.digest, checkpoint.config


@target(mutations.mutated_json, of_base("model.safetensors.index.json"))
def index(data: bytes) -> object:
    """The index of a sharded checkpoint."""
    from regraft.core.sources import open_checkpoint

    folder = variant("index")
    put(folder / "model.safetensors.index.json", data)
    return open_checkpoint(folder).specs


def configs() -> list[bytes]:
    from tests.families import CONFIGS

    own = json.loads((base() / "config.json").read_bytes())
    scaled = {
        **own,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }
    return [document(own), document(scaled), *(document({**own, "model_type": name}) for name in CONFIGS)]


STEPS: tuple[Mapping[str, Any], ...] = (
    {"use": "context-extension", "method": "yarn", "target_length": 4096},
    {"use": "prune", "score": "magnitude", "sparsity": 0.5},
    {"use": "fine-tune", "data": "rows.jsonl", "steps": 1},
)


@target(mutations.mutated_json, configs)
def config(data: bytes) -> object:
    """config.json of a checkpoint: opened, verified by structure, and planned on."""
    from regraft.core.host import host
    from regraft.core.plan import plan_step
    from regraft.core.recipe.load import recipe_from
    from regraft.core.sources import open_checkpoint
    from regraft.core.verify import check_structure

    folder = variant("config")
    put(folder / "config.json", data)
    checkpoint = open_checkpoint(folder)
    findings = check_structure(checkpoint, host().architectures())
    for step in STEPS:
        recipe = recipe_from({"base": {"model": str(folder)}, "steps": [dict(step)]}, scratch() / "recipe.toml", (),
                             host().transformations())  # fmt: skip
        try:
            plan_step(recipe.steps[0], checkpoint, host())
        except REFUSALS:
            continue
    return findings


def quantised() -> list[bytes]:
    from tests.checkpoints import entry, file_bytes

    state = document({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 16]})
    parts = {
        "a.weight": ("U8", [64, 1], bytes(64)),
        "a.weight.absmax": ("F32", [2], bytes(8)),
        "a.weight.quant_map": ("F32", [16], bytes(64)),
        "a.weight.quant_state.bitsandbytes__nf4": ("U8", [len(state)], state),
        "b.weight": ("I8", [2, 4], bytes(8)),
        "b.SCB": ("F32", [2], bytes(8)),
        "b.weight_format": ("U8", [], bytes(1)),
    }
    entries, blob = {}, b""
    for name, (dtype, shape, content) in parts.items():
        entries[name] = entry(dtype, shape, len(blob), len(blob) + len(content))
        blob += content
    return [file_bytes(entries, blob)]


@target(mutations.mutated_safetensors, quantised)
def bitsandbytes(data: bytes) -> object:
    """A quantised checkpoint, shown dequantised."""
    from regraft.core.sources import open_checkpoint

    folder = variant("bitsandbytes", ".nothing")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    put(folder / "model.safetensors", data)
    return open_checkpoint(folder).specs


@target(mutations.mutated_json, lambda: [quantised_state()])
def quant_state(data: bytes) -> object:
    """The state that bitsandbytes keeps beside a 4-bit weight."""
    from regraft.core.fourbit import parse_state

    return parse_state(data, "a.weight", nested=True).dump()


def quantised_state() -> bytes:
    return document({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 16],
                     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1})  # fmt: skip


def gguf_files() -> list[bytes]:
    from tests.core.gguf.binary import Binary
    from tests.core.gguf.writing import write_model
    from tests.families import tiny

    def vocabulary(kind: str) -> Callable[[Any], None]:
        def change(writer: Any) -> None:
            tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "<0x41>", *(f"t{n}" for n in range(3))]
            writer.add_tokenizer_model(kind)
            writer.add_token_list(tokens)
            writer.add_token_types([2, 3, 3, 1, 1, 1, 6, 1, 4, 5])
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
            writer.add_chat_template("{{ messages }}")
            if kind == "gpt2":
                writer.add_tokenizer_pre("llama-bpe")
                writer.add_token_merges(["a b"])
            else:
                writer.add_token_scores([0.0] * len(tokens))

        return change

    small = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
             "num_key_value_heads": 1, "num_hidden_layers": 1}  # fmt: skip
    model = tiny("llama", **small)
    files = [
        write_model(scratch() / f"seed-{kind}.gguf", model, change=vocabulary(kind)).read_bytes()
        for kind in ("gpt2", "llama")
    ]
    return [bytes(Binary()), *files]


@target(mutations.mutated_bytes, gguf_files)
def gguf(data: bytes) -> object:
    """A .gguf file: header, config and tokenizer."""
    from regraft.core.sources import open_checkpoint

    return open_checkpoint(put(scratch() / "model.gguf", data)).digest


# Recipes


def recipes() -> list[bytes]:
    from regraft.core.recipe.shipped import shipped_names, shipped_text

    full = b"""schema = 1
name = "all"
seed = 3
[base]
model = "demo:tiny"
trust_remote_code = false
[[steps]]
use = "context-extension"
method = "yarn"
target_length = 8_192
[[steps]]
id = "tuned"
use = "fine-tune"
data = { source = ["rows.jsonl"], columns = { text = 'body' }, max_tokens = 0x40 }
train = { precision = "float32", save_every = 5 }
lr = 1e-4
[output]
path = "out" # a comment
dtype = "bfloat16"
shard_size = "5GB"
"""
    return [full, *(shipped_text(name).encode() for name in shipped_names())]


@target(mutations.mutated_text, recipes)
def recipe(data: bytes) -> object:
    """A recipe, validated against the installed plugins."""
    from regraft.core.host import host
    from regraft.core.recipe.load import load_recipe

    return load_recipe(put(scratch() / "recipe.toml", data), (), host().transformations(), host().broken).resolved()


@target(mutations.mutated_text, lambda: [b"tuned.lr=1e-3", b"output.dtype='float16'", b'steps.0.use="x"', b"seed=1"])
def override(data: bytes) -> object:
    """A value of --set, over a recipe."""
    from regraft.core.host import host
    from regraft.core.recipe.load import load_recipe

    file = scratch() / "overridden.toml"
    if not file.exists():
        file.write_bytes(recipes()[0])
    text = data.decode("utf-8", "surrogateescape")
    return load_recipe(file, [text], host().transformations(), host().broken)


# Adapters and other inputs of steps


def adapter_files(name: str) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        return [(adapter() / name).read_bytes()]

    return seeds


@cache
def adapter() -> Path:
    from tests.adapters import write_adapter

    return write_adapter(scratch() / "adapter", modules=("self_attn.q_proj", "mlp.up_proj"), layers=1,
                         shapes={"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, 64),
                                 "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (64, 2),
                                 "base_model.model.model.norm.weight": (64,)},
                         rank_pattern={"^.*q_proj": 2}, alpha_pattern={"up_proj": 3.5}, modules_to_save=["norm"],
                         target_modules=["q_proj"], lora_dropout=0.0, bias="none")  # fmt: skip


def _merged(folder: Path) -> object:
    """The plan of merging the adapter in `folder`."""
    from regraft.core.sources import open_checkpoint
    from regraft.plugins.lora_merge import LoraMerge
    from regraft.plugins.lora_merge.params import LoraMergeParams

    params, checkpoint = LoraMergeParams(adapter=folder), open_checkpoint(base())
    LoraMerge().check(checkpoint, params)
    return LoraMerge().plan(checkpoint, params)


@cache
def adapter_copy(name: str) -> Path:
    import shutil

    return Path(shutil.copytree(adapter(), scratch() / name))


@target(mutations.mutated_json, adapter_files("adapter_config.json"))
def adapter_config(data: bytes) -> object:
    """adapter_config.json of a PEFT adapter, planned onto a base."""
    folder = adapter_copy("adapter-of-config")
    put(folder / "adapter_config.json", data)
    return _merged(folder)


@target(mutations.mutated_safetensors, adapter_files("adapter_model.safetensors"))
def adapter_weights(data: bytes) -> object:
    """The weights of a PEFT adapter, planned onto a base."""
    folder = adapter_copy("adapter-of-weights")
    put(folder / "adapter_model.safetensors", data)
    return _merged(folder)


def tokenizers() -> list[bytes]:
    from tests.core.data.vocabularies import KINDS, tokenizer

    files = [json.loads(tokenizer(kind).backend_tokenizer.to_str()) for kind in KINDS]
    wordpiece = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                 "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1, "##b": 2}}  # fmt: skip
    bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "unk_token": "a"}
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.5]]}
    added = [{"id": 7, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False}]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pipeline = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}, "post_processor": None,
                "pre_tokenizer": byte_level, "decoder": byte_level}  # fmt: skip
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **pipeline}
    return [*(document({**head, "model": model}) for model in (bpe, unigram, wordpiece)), document(files[0])]


@target(mutations.mutated_json, tokenizers)
def tokenizer(data: bytes) -> object:
    """tokenizer.json, as the steps that change vocabularies read it."""
    from regraft.core.jsonio import parse_object
    from regraft.core.verify.structure import token_ids
    from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

    parsed = parse_object(data, "tokenizer.json")
    token_ids(parsed)
    file = TokenizerFile.parse(parsed, "tokenizer.json")
    facts = (file.ids, file.tokens, file.rows, file.merges, file.scores, file.unknown, file.verbatim, file.spans_words)
    return facts, [file.bytes_of(token) for token in file.ids], file.stray()


def tokenizer_configs() -> list[bytes]:
    added = {"0": {"content": "<s>", "special": True}, "5": {"content": "x", "special": False}}
    return [document({"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": {"content": "<s>"},
                      "eos_token": "</s>", "added_tokens_decoder": added, "model_max_length": 128})]  # fmt: skip


@target(mutations.mutated_json, tokenizer_configs)
def tokenizer_config(data: bytes) -> object:
    """tokenizer_config.json, when rows move."""
    from dataclasses import replace

    from regraft.core.checkpoint import FileRef
    from regraft.core.sources import open_checkpoint
    from regraft.plugins.tokenizer_retrofit.donor import roles
    from regraft.plugins.tokenizer_retrofit.metadata import metadata

    checkpoint = open_checkpoint(base())
    checkpoint = replace(checkpoint, files={**checkpoint.files, "tokenizer_config.json": FileRef(data=data)})
    roles(checkpoint.json("tokenizer_config.json"))
    return metadata(checkpoint, 200, {n: n + 1 for n in range(200)}, padding=3)


def heads_files() -> list[bytes]:
    return [document({"site": "head", "heads": [[0, 1], [1, 0]], "scoring": "scale", "num_layers": 2, "num_heads": 4,
                      "scores": [[0.1, None], [0.2, 0.3]]})]  # fmt: skip


@target(mutations.mutated_json, heads_files)
def heads(data: bytes) -> object:
    """heads.json."""
    from regraft.core.head_file import read_head_file

    return read_head_file(put(scratch() / "heads.json", data)).as_bytes()


def vector_files() -> list[bytes]:
    from tests.checkpoints import entry, file_bytes

    entries = {"layers.0.attn_out": entry("F32", [4], 0, 16), "layers.1.heads.2": entry("BF16", [8], 16, 32)}
    return [file_bytes(entries, bytes(32))]


@target(mutations.mutated_safetensors, vector_files)
def vectors(data: bytes) -> object:
    """Steering vectors."""
    from regraft.plugins.steer.vectors import read_vectors

    return read_vectors(put(scratch() / "vectors.safetensors", data), 1.0)


@target(mutations.mutated_text, lambda: [b"king reine\nroi queen\n", b"3 2\nking 0.5 -1e-3\nqueen 1 2\n# 3 4\n"])
def word_vectors(data: bytes) -> object:
    """fastText's text form, and a dictionary."""
    from regraft.plugins.tokenizer_retrofit.wechsel import read_dictionary, read_vectors

    file = put(scratch() / "words.vec", data)
    try:
        return read_vectors(file, ["king", "queen", "#"])
    except REFUSALS:
        return read_dictionary(file)


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


def patches() -> list[bytes]:
    return [(saved_patch() / "patch.json").read_bytes()]


@cache
def saved_patch() -> Path:
    import torch

    from regraft.core.operations import ScaleRows, Value
    from regraft.core.patch import Edit, Patch, overlay
    from regraft.core.patch_folder import save_patch
    from regraft.core.sources import open_checkpoint
    from regraft.core.tensors import MemoryTensor

    below = open_checkpoint(base())
    name, spec = next(item for item in below.specs.items() if len(item[1].shape) == 2)
    norm, flat = next(item for item in below.specs.items() if len(item[1].shape) == 1)
    edits = {
        name: Edit(spec, ScaleRows(name, MemoryTensor("factors", torch.ones(spec.rows)))),
        norm: Edit(flat, Value(MemoryTensor("value", torch.ones(flat.shape)))),
    }
    patch = Patch(edits=edits, json={"config.json": {"a": 1}}, metrics={"m": 1.5}, notes=("n",))
    save_patch(patch, below, overlay(below, patch, by="seed"), scratch() / "seed.regraft")
    return scratch() / "seed.regraft"


@target(mutations.mutated_json, patches)
def patch(data: bytes) -> object:
    """patch.json of a saved patch, and its plan on the checkpoint it was made for."""
    import shutil

    from regraft.core.patch import overlay
    from regraft.core.sources import open_checkpoint
    from regraft.plugins.patch import PatchParams, ReapplyPatch

    folder = scratch() / "fuzzed.regraft"
    if not folder.exists():
        shutil.copytree(saved_patch(), folder)
    put(folder / "patch.json", data)
    checkpoint, params = open_checkpoint(base()), PatchParams(path=folder)
    ReapplyPatch().check(checkpoint, params)
    ReapplyPatch().plan(checkpoint, params)
    return overlay(checkpoint, ReapplyPatch().patch(checkpoint, params), by="patch").config


# Data


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


@target(mutations.mutated_text, lambda: [b"perplexity:held-out.txt window=512", b"choices:a.jsonl", b"passkey id=told"])
def task(data: bytes) -> object:
    """A value of `eval --task`."""
    from regraft.core.evaluate.tasks import read_tasks

    return read_tasks([data.decode("utf-8", "surrogateescape")], MappingProxyType({}))


@target(mutations.mutated_text, lambda: [b"bpb > 1.02 * base", b"(a.b < 1 or -c >= 2e3) and base.a != (1 + 2) / 3"])
def condition(data: bytes) -> object:
    """A value of `eval --fail-if`, and what it says of numbers."""
    from regraft.core.evaluate.condition import read_condition

    found = read_condition(data.decode("utf-8", "surrogateescape"))
    return found.holds(dict.fromkeys(found.names, 1.0))


# Records


@cache
def written() -> Path:
    """An output with its lock file."""
    from tests.running import done, write_recipe

    file = write_recipe(scratch() / "written.toml", str(base()), {"use": "context-extension", "method": "abf",
                                                                 "target_length": 4096})  # fmt: skip
    done("apply", file, "-o", scratch() / "written", "--no-durable")
    return scratch() / "written"


def lock_files() -> list[bytes]:
    return [(written() / "regraft.lock.json").read_bytes()]


@target(mutations.mutated_json, lock_files)
def lock(data: bytes) -> object:
    """regraft.lock.json, verified."""
    from regraft.core.verify.folder import verify_folder

    put(written() / "regraft.lock.json", data)
    return verify_folder(written())


def states() -> list[bytes]:
    return [document({"step": 2, "tokens": 10, "losses": [1.0, 0.5], "stopped": "", "optimizer": {"0": {"step": 2.0}},
                      "identity": {"format": 1, "lr": 0.1}})]  # fmt: skip


@target(mutations.mutated_json, states)
def training_state(data: bytes) -> object:
    """state.json of a training that was broken off."""
    import torch

    from regraft.core.training.state import State, StateFolder

    folder = StateFolder(scratch() / "state", {"lr": 0.1})
    if not (scratch() / "state").exists():
        folder.save(State(2, (1.0, 0.5), 10, {"w": torch.zeros(2)}, {}, {0: {"m": torch.zeros(2), "step": 2.0}}))
    put(scratch() / "state/step-00000002/state.json", data)
    return folder.load()
