"""From an image to the patch. The plan imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import InputError, UsageError
from regraft.core.host import host
from regraft.core.low_rank import LowRankDelta
from regraft.core.patch import Edit, Outline, Patch
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor, MemoryTensor, PromisedTensor
from regraft.core.transformation import Run
from regraft.plugins.vlora.attach import attached
from regraft.plugins.vlora.features import Sight, eyes_of, looks_by_itself, sight_of
from regraft.plugins.vlora.folder import GeneratorFolder, open_generator
from regraft.plugins.vlora.params import VloraParams
from regraft.plugins.vlora.places import Key, Place, check_model, places_of
from regraft.plugins.vlora.settings import GeneratorSettings
from regraft.plugins.vlora.train_own import OWN_CONFIG, OWN_WEIGHTS, own_generator, own_settings
from regraft.plugins.vlora.vision import Tower
from regraft.plugins.vlora.widen import check_widening, widened

if TYPE_CHECKING:
    import torch

    Pairs = Mapping[Key, tuple[torch.Tensor, torch.Tensor]]

BAKED_IN = (
    "the image is baked in: it acts on every token of every prompt, those about other things too; another image needs "
    "another output"
)

_NO_ADAPTER = (
    "type m, a path beside the whole MLP",
    'types = "qkvo" leaves it out; output = "merged" writes a whole checkpoint',
)
_FP32 = 4


@dataclass(frozen=True)
class Aim:
    """What the step will do, known from headers.

    Args:
        architecture: of the language model.
        settings: of the generator.
        label: of the generator, for messages and records.
        types: which deltas are applied.
        places: tensors that get low-rank deltas.
        sight: the images; None where the generator is attached, to look at run time.
        eyes: the vision encoder that goes along with an attached generator, if one is known.
        scale: of every delta.
        mlp_multiple: of new hidden units, for type m.
        own: whether the generator stands in the checkpoint itself.
        form: what the step would have written.
    """

    architecture: Architecture
    settings: GeneratorSettings
    label: str
    types: str
    places: tuple[Place, ...]
    sight: Sight | None
    eyes: Tower | None
    scale: float
    mlp_multiple: int
    own: bool
    form: Literal["adapter", "checkpoint"]

    @classmethod
    def of(cls, checkpoint: Checkpoint, params: VloraParams) -> Aim:
        """Look at headers and configs.

        Raises:
            InputError: generator, image, features or encoder are not valid, or for another model.
            Unsupported: the model has no place for a type.
            UsageError: there is no generator, or it has no such type.
        """
        own = params.generator is None
        settings, label = _settings(checkpoint, params)
        architecture = architecture_of(checkpoint.config, checkpoint.specs, families=host().architectures())
        check_model(settings, architecture, label)
        types = settings.types if params.types is None else params.types
        if not set(types) <= set(settings.types):
            raise UsageError("the generator has no such type", where="types", expected=f"some of {settings.types}",
                             found=types, remedy="leave the others out")  # fmt: skip
        attached = params.output == "attached"
        widens = "m" in types and not attached
        if widens:
            check_widening(architecture)
        elif "mlp_multiple" in params.model_fields_set:
            raise UsageError("no MLP gets wider, so mlp_multiple has no effect", where="mlp_multiple",
                             expected='output = "merged" and type m', remedy="remove it")  # fmt: skip
        return cls(
            architecture, settings, label, types, tuple(places_of(checkpoint, architecture, settings, types)),
            sight=None if attached else sight_of(params, settings),
            eyes=eyes_of(params, settings) if attached else None,
            scale=settings.scale * params.scale, mlp_multiple=params.mlp_multiple, own=own,
            form="adapter" if params.output == "adapter" else "checkpoint",
        )  # fmt: skip

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user and the model card."""
        if self.sight is None:
            return self._attached_notes
        names, layers = self.sight.names, self.settings.active_layers
        what = names[0] if len(names) == 1 else f"{len(names)} images ({', '.join(names)})"
        made = (
            f"{what} as deltas of rank {self.settings.rank} (types {self.types}) of {len(layers)} of "
            f"{self.settings.num_layers} layers, made by a generator of {self.settings.num_parameters} parameters"
        )
        found = [made, BAKED_IN]
        if len(names) > 1:
            found.append(f"the deltas of {len(names)} images are summed, and a generator is trained with one at a time")
        if left := [letter for letter in self.settings.types if letter not in self.types]:
            found.append(f"types {''.join(left)} are left out, though the generator was trained with them")
        if "m" in self.types:
            units = -(-self.settings.rank // self.mlp_multiple) * self.mlp_multiple
            found.append(f"every MLP is {units} units wider, for type m; and has biases")
        return tuple(found)

    @property
    def _attached_notes(self) -> tuple[str, ...]:
        settings = self.settings
        made = (
            f"a generator of {settings.num_parameters} parameters, which makes deltas of rank {settings.rank} (types "
            f"{self.types}) of {len(settings.active_layers)} of {settings.num_layers} layers"
        )
        features = f"image_features [batch, {settings.pos_num}, {settings.visual_dim}]"
        if self.eyes is None:
            seen = f"where the model or its generate() gets {features}, it sees the image; without them it is the base"
            return made, seen, 'it takes no pixels, since no vision encoder is known: name it with vision = "..."'
        count = sum(tensor.spec.numel for tensor in self.eyes.weights.values())
        seen = (
            f"its vision encoder, of {count} parameters, goes along: inputs = processor(images=..., text=..., "
            'return_tensors="pt") of AutoProcessor, then model.generate(**inputs); without an image it is the base'
        )
        return made, seen, f"in place of pixels the model and its generate() take {features}"


def outline(checkpoint: Checkpoint, params: VloraParams) -> Outline:
    """What the step changes, exactly. Raises as `Aim.of`."""
    aim = Aim.of(checkpoint, params)
    if aim.sight is None:
        shape = Outline.of(_attached(checkpoint, aim, params, planned=True))
        return replace(shape, notes=aim.notes, form=aim.form)
    shape = Outline.of(_patch(checkpoint, aim, None))
    factors = sum(place.total_rank * sum(place.spec.shape) for place in aim.places)
    size = _FP32 * (aim.settings.num_parameters + factors) + aim.sight.workspace_bytes
    beyond = _NO_ADAPTER if "m" in aim.types else None
    return replace(
        shape, notes=aim.notes, form=aim.form, beyond_adapter=beyond, workspace_bytes=size,
        unrecorded=f"the vision encoder {aim.settings.vision_tower}" if looks_by_itself(params, aim.settings) else "",
    )  # fmt: skip


def apply(checkpoint: Checkpoint, params: VloraParams, run: Run) -> Patch:
    """The patch, with all factors computed; weights are read when tensors are written.

    Raises:
        RegraftError: see `Vlora.apply`.
    """
    from regraft.plugins.vlora.report import deltas, metrics, reports, warnings

    aim = Aim.of(checkpoint, params)
    if aim.sight is None:
        patch = _attached(checkpoint, aim, params, planned=False)
        if aim.eyes is not None:
            aim.eyes.rehearse()
        return replace(patch, notes=aim.notes, metrics=metrics(aim, []))
    pairs = _pairs(_folder(checkpoint, params), aim, aim.sight, run)
    patch = _patch(checkpoint, aim, pairs)
    found = deltas(checkpoint, aim.places, patch.edits)
    return replace(patch, notes=(*aim.notes, *warnings(found)), metrics=metrics(aim, found), reports=reports(found))


def _settings(checkpoint: Checkpoint, params: VloraParams) -> tuple[GeneratorSettings, str]:
    if params.generator is not None:
        return open_generator(params.generator).settings, params.generator.name
    settings = own_settings(checkpoint)
    if settings is None:
        raise UsageError("there is no generator", where="generator",
                         expected="the folder of one, or an earlier step that trains one (vlora-train)",
                         remedy='give generator = "..."')  # fmt: skip
    return settings, "the generator of an earlier step"


def _folder(checkpoint: Checkpoint, params: VloraParams) -> GeneratorFolder:
    if params.generator is not None:
        return open_generator(params.generator)
    folder = own_generator(checkpoint)
    assert folder is not None, "the checkpoint of the run is that of the plan"
    return folder


def _pairs(folder: GeneratorFolder, aim: Aim, sight: Sight, run: Run) -> Pairs:
    """A [d_in, r] and B [d_out, r] by type and layer, fp32 on the CPU; A is the sum over the images."""
    import torch

    from regraft.core.training.model import memory

    run.tell(f"looking at {', '.join(sight.names)}")
    with memory("turning the image into weights"), torch.inference_mode():
        features = sight.look(run.device)
        made = folder.load(run.device)(features)
        # deltas are linear in A and share B, so those of several images are one of the same rank
        pairs = {key: (A.sum(0).cpu().clone(), B.cpu().clone()) for key, (A, B) in made.items() if key[0] in aim.types}
    for (letter, layer), factors in pairs.items():
        if not all(torch.isfinite(factor).all() for factor in factors):
            raise InputError(
                "the generator makes weights that are NaN or infinite", where=f"type {letter}, layer {layer}",
                remedy="check the features, and how the generator was trained",
            )  # fmt: skip
    return pairs


def _patch(checkpoint: Checkpoint, aim: Aim, pairs: Pairs | None) -> Patch:
    """Edits and config; with no pairs the values are promised."""
    edits: dict[str, Edit] = {place.spec.name: Edit(place.spec, _delta(place, pairs, aim.scale))
                              for place in aim.places}  # fmt: skip
    config: dict[str, Any] = {}
    if "m" in aim.types:
        beside = {layer: _beside(aim, layer, pairs) for layer in aim.settings.active_layers}
        numbers = {"rank": aim.settings.rank, "multiple": aim.mlp_multiple}
        wide = widened(checkpoint, aim.architecture, beside, scale=aim.scale, **numbers)
        edits |= wide.edits
        config = dict(wide.config)
    return Patch(edits=edits, json={CONFIG: config} if config else {}, dropped=_dropped(checkpoint, aim))


def _attached(checkpoint: Checkpoint, aim: Aim, params: VloraParams, *, planned: bool) -> Patch:
    """The generator in the checkpoint; planned, its values may not be there yet."""
    tensors: Mapping[str, LazyTensor]
    if planned and aim.own:
        tensors = {
            name: PromisedTensor(TensorSpec(name, "F32", shape)) for name, shape in aim.settings.shapes().items()
        }
    else:
        tensors = _folder(checkpoint, params).tensors
    patch = attached(checkpoint, aim.architecture, aim.settings, aim.types, tensors, aim.scale, aim.eyes)
    return replace(patch, dropped={**patch.dropped, **_dropped(checkpoint, aim)})


def _dropped(checkpoint: Checkpoint, aim: Aim) -> dict[str, str]:
    """The files of a generator that the checkpoint carries, whether it is the one that is used or not."""
    if aim.own:
        return dict.fromkeys((OWN_CONFIG, OWN_WEIGHTS), "the generator has done its work")
    found = (name for name in (OWN_CONFIG, OWN_WEIGHTS) if name in checkpoint.files)
    return dict.fromkeys(found, "another generator was named")


def _delta(place: Place, pairs: Pairs | None, scale: float) -> LowRankDelta:
    name, (rows, columns) = place.spec.name, place.spec.shape
    if pairs is None:
        left = PromisedTensor(TensorSpec(f"{name}: left", "F32", (rows, place.total_rank)))
        right = PromisedTensor(TensorSpec(f"{name}: right", "F32", (place.total_rank, columns)))
        return LowRankDelta(name, left, right, scale)
    one, other = place.factors(pairs)
    return LowRankDelta(name, MemoryTensor(f"{name}: left", one), MemoryTensor(f"{name}: right", other), scale)


def _beside(aim: Aim, layer: int, pairs: Pairs | None) -> tuple[LazyTensor, LazyTensor]:
    """Aᵀ [r, hidden] and B [hidden, r] of type m."""
    rank, hidden = aim.settings.rank, aim.architecture.hidden_size
    if pairs is None:
        return (PromisedTensor(TensorSpec(f"m.{layer}: right", "F32", (rank, hidden))),
                PromisedTensor(TensorSpec(f"m.{layer}: left", "F32", (hidden, rank))))  # fmt: skip
    A, B = pairs["m", layer]
    return MemoryTensor(f"m.{layer}: right", A.T.contiguous()), MemoryTensor(f"m.{layer}: left", B.contiguous())
