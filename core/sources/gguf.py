"""GGUF files as checkpoints: tensors dequantised on read, config and tokenizer rebuilt from the metadata."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import CONFIG, GENERATION_CONFIG, Checkpoint, FileRef
from regraft.core.errors import InputError
from regraft.core.jsonio import brief, dump
from regraft.core.sources.open import Reference

if TYPE_CHECKING:
    from regraft.core.gguf.metadata import Metadata
    from regraft.core.gguf.tensors import GgufFile

SUFFIX = ".gguf"


class GgufSource:
    """Accepts `.gguf` files by name."""

    name = "gguf"

    def accepts(self, reference: Reference) -> bool:
        """Whether the name ends in `.gguf` and is no folder; whether the file exists is for `open` to say."""
        return reference.path.suffix.lower() == SUFFIX and not reference.path.is_dir()

    def open(self, reference: Reference) -> Checkpoint:
        """Open the file; of the weights nothing is read.

        Raises:
            InputError: no such file, a header that lies, or an architecture, encoding or tokenizer that regraft cannot
                express as a stock checkpoint.
        """
        from regraft.core.gguf.metadata import Metadata
        from regraft.core.gguf.tensors import GgufFile

        if not reference.path.is_file():
            raise InputError("there is no such file", where=reference.model, remedy="check the path")
        file = GgufFile(reference.path)
        meta = Metadata(reference.path, file.header.metadata)
        _check_kind(meta)
        return _checkpoint(reference.model, file, meta)


def _checkpoint(label: str, file: GgufFile, meta: Metadata) -> Checkpoint:
    from regraft.core.gguf.config import build_config, build_generation_config, sizes_of, special_ids
    from regraft.core.gguf.families import Model, family
    from regraft.core.gguf.names import biases, named_tensors
    from regraft.core.gguf.tokenizer import tokenizer_files

    kind, sizes = family(meta), sizes_of(file.header, meta)
    model = Model(file, meta, sizes, biases(file.header))
    special = special_ids(meta, sizes.vocab_size)
    files = {CONFIG: FileRef(data=dump(build_config(model, kind, special)))}
    if generation := build_generation_config(meta, sizes.vocab_size, special):
        files[GENERATION_CONFIG] = FileRef(data=dump(generation))
    tensors = named_tensors(file, sizes, replace(kind.naming, biases=model.biases))
    tokenizer, notes = tokenizer_files(meta, sizes.vocab_size, special, in_order=kind.gemma_order)
    encodings = Counter(tensor.stored.type_name for tensor in tensors.values())
    return Checkpoint(
        label,
        tensors,
        files | tokenizer,
        origin=_origin(file, meta, encodings),
        notes=(*_notes(encodings), *notes),
    )


def _check_kind(meta: Metadata) -> None:
    """Refuse what is no whole model by its own account.

    Raises:
        InputError: a part of a split model, an adapter, a projector, or weights quantised by an old scheme.
    """
    if (parts := meta.integer("split.count", 0)) > 1:
        raise meta.fault(
            "split.count",
            "is one part of a split model",
            expected="a single file",
            found=f"{parts} parts",
            remedy="merge the parts first: llama-gguf-split --merge FIRST_PART OUTPUT",
        )
    if (kind := meta.text("general.type", "model")) != "model":
        remedy = "name the file of the base model"
        raise meta.fault("general.type", "is not a model", expected="model", found=brief(kind), remedy=remedy)
    if (version := meta.integer("general.quantization_version", 2)) != 2:
        message = "is quantised by a scheme that nothing reads any more"
        raise meta.fault("general.quantization_version", message, expected=2, found=version)


def _notes(encodings: Counter[str]) -> tuple[str, ...]:
    from regraft.core.gguf.tensors import PLAIN

    packed = ", ".join(f"{count} {name}" for name, count in sorted(encodings.items()) if name not in PLAIN)
    lost = "precision lost when the file was quantised does not return"
    return (f"dequantised on read to F32: {packed}; {lost}",) if packed else ()


def _origin(file: GgufFile, meta: Metadata, encodings: Counter[str]) -> dict[str, Any]:
    facts = {name: meta.values.get(f"general.{name}") for name in ("name", "license")}
    facts["pre_tokenizer"] = meta.values.get("tokenizer.ggml.pre")
    return {
        "source": GgufSource.name,
        "file": meta.path.name,
        "bytes": file.header.file_bytes,
        "gguf_version": file.header.version,
        "architecture": meta.architecture,
        "encodings": dict(sorted(encodings.items())),
        **{name: value for name, value in facts.items() if isinstance(value, str)},
    }
