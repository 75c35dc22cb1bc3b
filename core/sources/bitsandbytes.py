"""Checkpoints that bitsandbytes quantised, shown dequantised: 4-bit (nf4, fp4, also doubly quantised) and 8-bit.

The tensors of a quantised weight `W`, as transformers writes them:

    4-bit   W                                   two codes a byte, [ceil(elements / 2), 1]
            W.absmax                            a scale for each block: fp32, or uint8 codes if doubly quantised
            W.quant_map                         the 16 values of the codes, fp32
            W.quant_state.bitsandbytes__nf4     JSON text as bytes: shape, dtype, block size (or ...__fp4)
            W.nested_absmax, W.nested_quant_map scales and values of the scales' codes, if doubly quantised
    8-bit   M.weight                            int8 [rows, columns], M being the module
            M.SCB                               the largest magnitude of each row, fp32 [rows]
            M.weight_format                     0: row by row

Specs come from headers and from the JSON text alone; values are computed row by row when they are read, and equal
bitsandbytes' own. A GPT-2 weight, stored as [in, out] before quantisation, is stored quantised as [out, in]; it is
shown as the unquantised class expects it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from regraft.core.buffers import unreadable
from regraft.core.checkpoint import CONFIG, Checkpoint, FileRef
from regraft.core.dequantised import EightBitTensor, FourBitTensor
from regraft.core.derived import ConstantTensor, TransposedTensor
from regraft.core.errors import InputError
from regraft.core.fourbit import STATE_MARK, State, parse_state
from regraft.core.jsonio import dump, merge
from regraft.core.operations import ComputedTensor, Value
from regraft.core.specs import CODE_OF_NAME, ITEM_BYTES, NAME_OF_CODE, TensorSpec
from regraft.core.tensors import LazyTensor

_SIDE_TENSORS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_CONV1D_MODELS = frozenset({"gpt2", "imagegpt", "openai-gpt", "decision_transformer"})
_CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""In these models these modules are transformers' Conv1D, whose weights are transposed before they are quantised."""

_MAX_STATE_BYTES = 4096
_DAMAGED = "the checkpoint is damaged or incomplete: fetch it again"


def dequantise(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with its bitsandbytes weights shown as float tensors, and a config that calls them so.

    Args:
        checkpoint: its config.json has a `quantization_config`.

    Raises:
        InputError: quantised by another method, or a weight's tensors are missing or contradict each other.
    """
    _check_method(checkpoint)
    shown: dict[str, LazyTensor] = {}
    states = dict(_states(checkpoint))
    scales = dict(_row_scales(checkpoint))
    hidden = set(_side_tensors(checkpoint, states, scales))
    for name, tensor in checkpoint.tensors.items():
        if name in hidden:
            continue
        if name in states:
            tensor = _four_bit(checkpoint, name, states[name])
        elif name in scales:
            tensor = _eight_bit(checkpoint, name, scales[name])
        else:
            _check_plain(checkpoint, tensor.spec)
        shown[name] = _as_in_class(checkpoint, tensor) if name in states or name in scales else tensor
    return _assemble(checkpoint, shown, _kinds(states, scales), len(states) + len(scales))


def _as_in_class(checkpoint: Checkpoint, tensor: LazyTensor) -> LazyTensor:
    module = tensor.spec.name.removesuffix(".weight").rpartition(".")[2]
    is_conv1d = checkpoint.config.get("model_type") in _CONV1D_MODELS and module in _CONV1D_MODULES
    return TransposedTensor(tensor) if is_conv1d else tensor


def _check_method(checkpoint: Checkpoint) -> None:
    config, where = checkpoint.config["quantization_config"], f"{checkpoint.label}: {CONFIG}: quantization_config"
    if not isinstance(config, Mapping):
        raise InputError("is not an object", where=where, expected="an object with quant_method",
                         found=type(config).__name__, remedy="correct config.json")  # fmt: skip
    old = config.get("load_in_4bit") or config.get("load_in_8bit")
    method = config.get("quant_method", "bitsandbytes" if old else None)
    if method != "bitsandbytes":
        name = method or "an unnamed method"
        raise InputError(f"the checkpoint is quantised with {name}, which regraft does not read", where=where,
                         expected="no quantisation, or quant_method bitsandbytes", found=f"quant_method {method}",
                         remedy="use the model's unquantised checkpoint")  # fmt: skip


def _states(checkpoint: Checkpoint) -> Iterator[tuple[str, State]]:
    """The state of every 4-bit weight, by the weight's name."""
    for name, tensor in checkpoint.tensors.items():
        weight, mark, quant_type = name.partition(STATE_MARK)
        if not mark:
            continue
        where = f"{checkpoint.label}: {name}"
        if weight not in checkpoint.tensors:
            raise _missing(checkpoint, weight, f"the weight that {name} describes")
        if tensor.spec.dtype != "U8" or len(tensor.spec.shape) != 1 or tensor.spec.nbytes > _MAX_STATE_BYTES:
            raise InputError("is no quantisation state", where=where, expected=f"U8, at most {_MAX_STATE_BYTES} bytes",
                             found=tensor.spec, remedy=_DAMAGED)  # fmt: skip
        state = parse_state(_stored(tensor), where, nested=f"{weight}.nested_absmax" in checkpoint.tensors)
        if state.quant_type != quant_type:
            raise InputError("name and contents of the quantisation state disagree", where=where, expected=quant_type,
                             found=state.quant_type, remedy=_DAMAGED)  # fmt: skip
        yield weight, state


def _row_scales(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """The row scales of every 8-bit weight, by the weight's name."""
    for name in checkpoint.tensors:
        if name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            if weight not in checkpoint.tensors:
                raise _missing(checkpoint, weight, f"the weight that {name} scales")
            yield weight, name


def _stored(tensor: LazyTensor) -> bytes:
    """The bytes of a small tensor, without torch unless a step computes them."""
    if isinstance(tensor, ConstantTensor):
        return tensor.data
    if isinstance(tensor, ComputedTensor) and isinstance(tensor.operation, Value):
        return _stored(tensor.operation.tensor)
    if (raw := tensor.raw) is None:
        return bytes(tensor.load().cpu().numpy().tobytes())
    try:
        with raw.path.open("rb") as file:
            file.seek(raw.offset)
            return file.read(raw.nbytes)
    except OSError as error:
        raise unreadable(raw.path, error) from None


def _side_tensors(checkpoint: Checkpoint, states: Mapping[str, State], scales: Mapping[str, str]) -> Iterator[str]:
    for name in checkpoint.tensors:
        weight, _, part = name.rpartition(".")
        if STATE_MARK in name or name.endswith(".SCB"):
            yield name
        elif f".{part}" in _SIDE_TENSORS:
            if weight not in states:
                raise _missing(checkpoint, f"{weight}{STATE_MARK}nf4", f"the quantisation state that {name} belongs to")
            yield name
        elif part == "weight_format":
            if f"{weight}.weight" not in scales:
                raise _missing(checkpoint, f"{weight}.SCB", f"the row scales that {name} belongs to")
            yield name


def _four_bit(checkpoint: Checkpoint, name: str, state: State) -> FourBitTensor:
    codes = checkpoint.tensors[name]
    spec = TensorSpec(name, state.dtype, state.shape)
    packed_bytes, blocks = -(-spec.numel // 2), -(-spec.numel // state.block_size)
    items = packed_bytes // ITEM_BYTES[codes.spec.dtype]
    _expect(checkpoint, codes, {codes.spec.dtype}, (items, 1), packed_bytes)
    _side(checkpoint, f"{name}.quant_map", "F32", (16,))
    scales = _side(checkpoint, f"{name}.absmax", "U8" if state.nested else "F32", (blocks,))
    if state.nested is None:
        return FourBitTensor(spec, state, codes, scales)
    nested_scales = _side(checkpoint, f"{name}.nested_absmax", "F32", (-(-blocks // state.nested.block_size),))
    nested_map = _side(checkpoint, f"{name}.nested_quant_map", "F32", (256,))
    return FourBitTensor(spec, state, codes, scales, nested_scales, nested_map)


def _eight_bit(checkpoint: Checkpoint, name: str, scale_name: str) -> EightBitTensor:
    codes = checkpoint.tensors[name]
    if codes.spec.dtype != "I8" or len(codes.spec.shape) != 2:
        raise InputError("is no 8-bit weight, though it has row scales", where=f"{checkpoint.label}: {name}",
                         expected="I8, two dimensions", found=codes.spec, remedy=_DAMAGED)  # fmt: skip
    scales = _side(checkpoint, scale_name, "F32", codes.spec.shape[:1])
    _check_format(checkpoint, f"{name}_format")
    return EightBitTensor(replace(codes.spec, dtype=_config_dtype(checkpoint)), codes, scales)


def _check_format(checkpoint: Checkpoint, name: str) -> None:
    if name not in checkpoint.tensors:
        return
    tensor = _side(checkpoint, name, "U8", ())
    if (data := _stored(tensor)) != b"\0":
        remedy = "load it with the bitsandbytes that wrote it, and save it with a release from 0.45 on"
        raise InputError("the 8-bit weight is not stored row by row", where=f"{checkpoint.label}: {name}",
                         expected="format 0", found=f"format {data.hex()}", remedy=remedy)  # fmt: skip


def _config_dtype(checkpoint: Checkpoint) -> str:
    """The dtype in which an 8-bit checkpoint is shown: the config's, else float16, which it came from."""
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            name = config.get(key) if isinstance(config, Mapping) else None
            if name in CODE_OF_NAME:
                return CODE_OF_NAME[name]
            if name is not None:
                raise InputError(
                    "is no dtype of weights",
                    where=f"{checkpoint.label}: {CONFIG}: {key}",
                    expected=", ".join(CODE_OF_NAME),
                    found=repr(name),
                    remedy="correct config.json",
                )
    return "F16"


def _side(checkpoint: Checkpoint, name: str, dtype: str, shape: tuple[int, ...]) -> LazyTensor:
    if name not in checkpoint.tensors:
        raise _missing(checkpoint, name, f"{dtype} {list(shape)}")
    tensor = checkpoint.tensors[name]
    _expect(checkpoint, tensor, {dtype}, shape)
    return tensor


def _expect(
    checkpoint: Checkpoint, tensor: LazyTensor, dtypes: set[str], shape: tuple[int, ...], nbytes: int | None = None
) -> None:
    spec = tensor.spec
    wrong_size = nbytes is not None and spec.nbytes != nbytes
    if spec.dtype not in dtypes or spec.shape != shape or wrong_size:
        expected = f"{' or '.join(sorted(dtypes))} {list(shape)}" + (f", {nbytes} bytes" if nbytes is not None else "")
        raise InputError("contradicts the rest of its weight", where=f"{checkpoint.label}: {spec.name}",
                         expected=expected, found=f"{spec.dtype} {list(spec.shape)}", remedy=_DAMAGED)  # fmt: skip


def _check_plain(checkpoint: Checkpoint, spec: TensorSpec) -> None:
    """A weight of integers that no state and no scales belong to could only be misread."""
    if spec.name.endswith(".weight") and spec.dtype in ("U8", "I8"):
        companion = f"{spec.name}{STATE_MARK}nf4" if spec.dtype == "U8" else spec.name.removesuffix("weight") + "SCB"
        raise _missing(checkpoint, companion, f"what tells how to read {spec.name}, {spec.dtype} {list(spec.shape)}")


def _missing(checkpoint: Checkpoint, name: str, expected: str) -> InputError:
    return InputError("a tensor of a quantised weight is missing", where=f"{checkpoint.label}: {name}",
                      expected=expected, found="no such tensor", remedy=_DAMAGED)  # fmt: skip


def _kinds(states: Mapping[str, State], scales: Mapping[str, str]) -> str:
    kinds = {f"{state.quant_type}{' (doubly quantised)' if state.nested else ''}" for state in states.values()}
    return ", ".join(sorted(kinds | ({"int8"} if scales else set())))


def _assemble(checkpoint: Checkpoint, shown: Mapping[str, LazyTensor], kinds: str, count: int) -> Checkpoint:
    config = FileRef(data=dump(merge(checkpoint.config, {"quantization_config": None})))
    dtypes = sorted({NAME_OF_CODE[t.spec.dtype] for name, t in shown.items() if t is not checkpoint.tensors[name]})
    note = f"{count} weights that bitsandbytes quantised to {kinds} are read as {' and '.join(dtypes)}"
    return replace(
        checkpoint,
        tensors=dict(shown),
        files={**checkpoint.files, CONFIG: config},
        shards={name: shard for name, shard in checkpoint.shards.items() if name in shown},
        origin={**checkpoint.origin, "quantization": f"bitsandbytes {kinds}"} if count else checkpoint.origin,
        notes=(*checkpoint.notes, note) if count else checkpoint.notes,
        packed=checkpoint if count else None,
    )
