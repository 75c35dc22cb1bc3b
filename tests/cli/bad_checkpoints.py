"""Bases, adapters and saved patches that are damaged, or made for another model."""

import json
import shutil
from pathlib import Path

from tests.adapters import write_adapter
from tests.checkpoints import entry, file_bytes, write_checkpoint
from tests.cli.faults import (
    FIRST,
    INDEX,
    case,
    edit_header,
    edit_index,
    edit_json,
    header_of,
    recipe,
    set_values,
    zeros,
)
from tests.running import ABF, done, recipe_text, write_recipe


@case(3)
def missing_model_folder():
    recipe(recipe_text("./nope", ABF, path="out"))


@case(3)
def folder_without_config():
    recipe()
    Path("base/config.json").unlink()


@case(3)
def config_that_is_not_json():
    recipe()
    Path("base/config.json").write_text('{"model_type": "llama",')


@case(3)
def config_without_model_type():
    recipe()
    edit_json("config.json", model_type=None)


@case(1)
def unsupported_architecture():
    recipe()
    edit_json("config.json", model_type="florence2")


@case(3)
def truncated_shard():
    recipe()
    path = Path("base", FIRST)
    path.write_bytes(path.read_bytes()[:-100])


@case(3)
def truncated_header():
    recipe()
    path = Path("base", FIRST)
    path.write_bytes(path.read_bytes()[:40])


@case(3)
def empty_shard():
    recipe()
    Path("base", FIRST).write_bytes(b"")


@case(3)
def shard_that_is_text():
    recipe()
    Path("base", FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 57680\n")


@case(3)
def oversized_header():
    recipe()
    Path("base", FIRST).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


@case(3)
def overlapping_tensors():
    recipe()

    def overlap(header):
        name = list(header)[-1]
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [begin - 4, end - 4]

    edit_header(overlap)


@case(3)
def header_that_lies_about_a_shape():
    recipe()
    edit_header(lambda header: header["model.embed_tokens.weight"].update(shape=[128, 65]))


@case(3)
def header_with_an_unknown_dtype():
    recipe()
    edit_header(lambda header: header["model.embed_tokens.weight"].update(dtype="F7"))


@case(3)
def header_that_is_not_json():
    recipe()
    Path("base", FIRST).write_bytes(file_bytes(b'{"model', b""))


@case(3)
def index_naming_a_missing_shard():
    recipe()
    Path("base", FIRST).unlink()


@case(3)
def index_without_weight_map():
    recipe()
    edit_json(INDEX, weight_map=None)


@case(3)
def tensor_in_two_shards():
    recipe()
    path = Path("base", "model-00006-of-00006.safetensors")
    header, data = header_of(path)
    header["model.embed_tokens.weight"] = entry("F32", [1], len(data), len(data) + 4)
    path.write_bytes(file_bytes(header, data + bytes(4)))


@case(3)
def tensor_in_another_shard_than_the_index_says():
    recipe()
    edit_index(lambda weights: weights.update({"model.embed_tokens.weight": "model-00002-of-00006.safetensors"}))


@case(3)
def tensor_that_the_index_does_not_name():
    recipe()
    edit_index(lambda weights: weights.pop("model.norm.weight"))


@case(3)
def index_naming_a_path_outside():
    recipe()
    edit_index(lambda weights: weights.update({"model.norm.weight": "../secret.safetensors"}))


@case(3)
def index_and_single_file():
    recipe()
    Path("base/model.safetensors").write_bytes(file_bytes({}))


@case(3)
def shapes_that_contradict_the_config():
    recipe()
    edit_json("config.json", intermediate_size=100)


@case(3)
def fewer_layers_than_the_config_says():
    recipe()
    edit_json("config.json", num_hidden_layers=3)


@case(3)
def tensors_of_another_family():
    recipe()
    edit_json("config.json", model_type="gpt2")


@case(3)
def config_with_text_for_a_size():
    recipe()
    edit_json("config.json", hidden_size="64")


@case(3)
def tokenizer_beyond_the_embedding():
    recipe()
    tokenizer = json.loads(Path("base/tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 500, "content": "<|tool|>"})
    Path("base/tokenizer.json").write_text(json.dumps(tokenizer))


@case(3)
def tied_flag_against_a_stored_head():
    recipe()
    edit_json("config.json", tie_word_embeddings=True)


@case(1, "apply", "recipe.toml", "--strict")
def nan_in_what_a_step_reads():
    recipe(dtype="bfloat16")
    set_values("model.layers.0.mlp.up_proj.weight", float("nan"), 3)


@case(1)
def values_too_large_for_the_output():
    recipe(dtype="float16")
    set_values("model.norm.weight", 1e9)


@case(3)
def pickled_weights():
    recipe()
    for path in [*Path("base").glob("*.safetensors"), Path("base", INDEX)]:
        path.unlink()
    Path("base/pytorch_model.bin").write_bytes(b"\x80\x04.")


@case(3)
def pickle_named_as_the_model():
    Path("base/pytorch_model.bin").write_bytes(b"\x80\x04.")
    recipe(recipe_text("base/pytorch_model.bin", ABF, path="out"))


@case(3)
def folder_without_weights():
    recipe()
    for path in [*Path("base").glob("*.safetensors"), Path("base", INDEX)]:
        path.unlink()


@case(3)
def one_shard_named_as_the_model():
    recipe(recipe_text(f"base/{FIRST}", ABF, path="out"))


@case(3)
def unreadable_quantisation():
    recipe()
    edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def merge():
    recipe(recipe_text("base", {"use": "lora-merge", "adapter": "adapter"}, path="out"))


@case(3)
def missing_adapter():
    merge()


@case(3)
def adapter_with_other_names():
    merge()
    write_adapter("adapter", {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": (2, 64),
                              "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": (192, 2)})  # fmt: skip


@case(3)
def adapter_for_another_width():
    merge()
    write_adapter("adapter", dims=(128, 128))


@case(3)
def adapter_for_more_layers():
    merge()
    write_adapter("adapter", layers=4)


@case(3)
def adapter_whose_rank_lies():
    merge()
    write_adapter("adapter", r=8)


@case(1)
def adapter_of_another_type():
    merge()
    write_adapter("adapter", peft_type="IA3")


@case(3)
def pickled_adapter():
    merge()
    write_adapter("adapter")
    Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin")


@case(3)
def damaged_adapter():
    merge()
    path = write_adapter("adapter") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def saved_patch():
    """A recipe that reapplies a saved LoRA merge."""
    write_adapter("adapter")
    write_recipe(Path("first.toml"), "base", {"use": "lora-merge", "adapter": "adapter"}, path="first")
    done("apply", "first.toml", "--save-patches", "patches")
    shutil.rmtree("first")
    recipe(recipe_text("base", {"use": "patch", "path": "patches/lora-merge.regraft"}, path="out"))
    return Path("patches/lora-merge.regraft")


@case(3)
def missing_patch():
    recipe(recipe_text("base", {"use": "patch", "path": "nope.regraft"}, path="out"))


@case(3)
def patch_that_is_not_json():
    (saved_patch() / "patch.json").write_text("{")


@case(3)
def patch_of_another_version():
    path = saved_patch() / "patch.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))


@case(3)
def patch_with_damaged_tensors():
    path = saved_patch() / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@case(3)
def patch_with_a_missing_operand():
    path = saved_patch() / "patch.json"
    path.write_text(path.read_text().replace("::A", "::Z").replace("::right", "::Z"))


@case(3)
def patch_with_a_path_outside():
    path = saved_patch() / "patch.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": ["../../secret"]}))


@case(1)
def patch_for_another_checkpoint():
    saved_patch()
    shutil.rmtree("base")
    write_checkpoint(Path("base"), {"model.embed_tokens.weight": zeros(128, 64)}, config={"model_type": "none"})
