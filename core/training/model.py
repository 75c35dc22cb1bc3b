"""The stock transformers model and the tokenizer of a checkpoint, overlays included, without writing a checkpoint."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, ResourceError, Unsupported, first_line
from regraft.core.specs import CODE_OF_NAME, FLOAT_CODES, torch_dtype

if TYPE_CHECKING:
    import torch

Quantize = Literal["none", "nf4", "int8"]

_SIDE_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"})
_LEFTOVERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Buffers that old checkpoints stored and stock classes compute."""
_FAULTS = (
    ("missing_keys", "the model's class has tensors that the checkpoint lacks"),
    ("unexpected_keys", "the checkpoint has tensors that the model's class does not know"),
    ("mismatched_keys", "tensors have another shape than the model's class expects"),
)
_SHOWN = 5


def materialise_model(
    checkpoint: Checkpoint,
    device: str = "cpu",
    dtype: str = "float32",
    quantize: Quantize = "none",
    *,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The checkpoint's model, in eval mode, nothing of it learning; its tensors are copies.

    Args:
        checkpoint: as it stands at a step.
        device: torch device.
        dtype: `float32`, `bfloat16` or `float16`: of every floating-point tensor.
        quantize: `nf4` or `int8` holds the linear layers in bitsandbytes form, computing in `dtype`; the head stays.
        gradient_checkpointing: switched on; it takes effect in training mode.
        trust_remote_code: let code of the checkpoint run; without, the stock class of its `model_type` is taken.

    Raises:
        InputError: the tensors do not fit the class, or config.json is none that transformers reads.
        Unsupported: no stock class, or quantisation is not possible here.
        ResourceError: not enough memory.
    """
    if device.startswith("cuda"):  # before the first product: without it cuBLAS may give other bits every time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with side_folder(checkpoint) as folder, quiet():
        config = _config(checkpoint, folder, trust_remote_code)
        kind = _class_of(checkpoint, config, folder, trust_remote_code)
        state = state_of(checkpoint, dtype)
        model = _build(checkpoint, kind, config, state, device, dtype, quantize)
    set_generation(model, checkpoint)
    model.name_or_path = checkpoint.label
    model.requires_grad_(False)
    if gradient_checkpointing:
        switch_gradient_checkpointing(model)
    return model.eval()


def materialise_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        InputError: it has none that transformers reads.
    """
    with side_folder(checkpoint) as folder, quiet():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers and tokenizers raise what they like here
            raise InputError(
                "the checkpoint has no tokenizer that transformers reads",
                where=checkpoint.label,
                expected="tokenizer.json, or the files of a tokenizer that it knows",
                found=first_line(error),
                remedy="add the tokenizer files of the base model",
            ) from None
    tokenizer.name_or_path = checkpoint.label
    return tokenizer


def window_of(checkpoint: Checkpoint, model: Any) -> int:
    """Tokens that the model's positions allow, from its config.

    Raises:
        InputError: the config does not say.
    """
    config = model.config.get_text_config()
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(value := getattr(config, key, None), int):
            return value
    raise InputError("the config names no window", where=f"{checkpoint.label}: config.json: max_position_embeddings")


def switch_gradient_checkpointing(model: Any) -> None:
    """Switch it on, in the form that works with frozen inputs.

    Raises:
        Unsupported: the class cannot.
    """
    try:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise Unsupported("the model has no gradient checkpointing", found=error, remedy="switch it off") from None


@contextmanager
def side_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """A temporary folder with the checkpoint's config, tokenizer and code, and no weights.

    Its last name depends on the code alone: transformers keeps code that it has run under that name.
    """
    code = [[name, file.sha256()] for name, file in checkpoint.files.items() if name.endswith(".py")]
    own = "checkpoint_" + hashlib.sha256(repr(sorted(code)).encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory(prefix="regraft-") as name:
        folder = Path(name, own)
        for file, reference in checkpoint.files.items():
            if PurePosixPath(file).suffix in _SIDE_SUFFIXES:
                path = folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(reference.read())
        yield folder


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers; what matters is checked by us."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def memory(doing: str) -> Iterator[None]:
    """Turns an allocation that fails into an error that names the knobs.

    Raises:
        ResourceError: torch ran out of memory.
    """
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        text = str(error)
        if type(error) is RuntimeError and "allocate memory" not in text and "not enough memory" not in text:
            raise
        raise ResourceError(
            f"out of memory while {doing}",
            found=first_line(error),
            remedy="lower micro_batch or max_tokens, switch on gradient_checkpointing, use optimizer = \"adamw-8bit\", "
            "or hold the frozen weights as nf4",
        ) from None  # fmt: skip


def state_of(checkpoint: Checkpoint, dtype: str) -> dict[str, torch.Tensor]:
    """Every tensor by its name, a copy, floating-point ones in `dtype`.

    Raises:
        ResourceError: not enough memory.
    """
    wanted = torch_dtype(CODE_OF_NAME[dtype])
    with memory("loading the model"):
        return {
            name: tensor.load().to(wanted, copy=True) if tensor.spec.dtype in FLOAT_CODES else tensor.load().clone()
            for name, tensor in checkpoint.tensors.items()
        }


def set_generation(model: Any, checkpoint: Checkpoint) -> None:
    """Give a model what the checkpoint's generation_config.json says, if there is one."""
    from transformers import GenerationConfig

    if checkpoint.generation_config:
        model.generation_config = GenerationConfig.from_dict(dict(checkpoint.generation_config))


def _config(checkpoint: Checkpoint, folder: Path, trust: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:  # transformers raises what it likes here
        raise InputError(
            "transformers does not read the config",
            where=f"{checkpoint.label}: config.json",
            found=first_line(error),
            remedy="correct config.json, or trust the checkpoint's own code if it needs it",
        ) from None


def _class_of(checkpoint: Checkpoint, config: Any, folder: Path, trust: bool) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if own and trust:
        return get_class_from_dynamic_module(own, str(folder))
    try:
        kinds = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise Unsupported(
            "stock transformers has no class for this model that predicts tokens",
            where=f"{checkpoint.label}: config.json: model_type",
            found=config.model_type,
            remedy="use a causal language model, or trust the checkpoint's own code",
        ) from None
    if not isinstance(kinds, Sequence):
        return kinds
    named = [kind for kind in kinds if kind.__name__ in (config.architectures or ())]
    return (named or list(kinds))[0]


def _build(
    checkpoint: Checkpoint,
    kind: Any,
    config: Any,
    state: dict[str, torch.Tensor],
    device: str,
    dtype: str,
    quantize: Quantize,
) -> Any:
    options: dict[str, Any] = {"dtype": torch_dtype(CODE_OF_NAME[dtype])}
    if quantize != "none":
        options |= {"quantization_config": _quantisation(quantize, options["dtype"]), "device_map": {"": device}}
    with memory("loading the model"):
        try:
            model, info = kind.from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except (ImportError, ValueError, KeyError, AttributeError) as error:
            raise Unsupported(
                "transformers cannot build the model",
                where=checkpoint.label,
                found=first_line(error),
                remedy="install what it names, trust the checkpoint's own code, or use another base",
            ) from None
        _check(checkpoint, info)
        return _unpacked(model) if quantize != "none" else model.to(device)


def _unpacked(model: Any) -> Any:
    """`model`, whose 4-bit weights keep the layout that gradients flow through.

    On processors with AVX512-BF16, bitsandbytes packs them anew at the first forward pass in eval mode, for products
    that have no gradient: a training after it would silently learn nothing from the layers below.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _quantisation(quantize: Quantize, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _check(checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    for key, message in _FAULTS:
        names = sorted(str(one[0]) if isinstance(one, tuple) else str(one) for one in info.get(key) or ())
        names = [name for name in names if not name.endswith(_LEFTOVERS)]
        if names:
            shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            raise InputError(message, where=checkpoint.label, found=shown, remedy="check config.json and the tensors")
