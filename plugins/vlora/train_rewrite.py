"""What `vlora-train` changes and costs: from headers, configs and parameters. Light: no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import Unsupported, UsageError
from regraft.core.host import host
from regraft.core.patch import Outline
from regraft.core.training.footprint import shared_bytes, state_bytes, training_bytes
from regraft.core.training.whole import learnable, refuse_quantised
from regraft.plugins.vlora.folder import GeneratorFolder, open_generator
from regraft.plugins.vlora.places import check_model
from regraft.plugins.vlora.settings import GeneratorSettings, settings_for
from regraft.plugins.vlora.train_data import check_files
from regraft.plugins.vlora.train_own import OWN, OWN_CONFIG, OWN_WEIGHTS, config_change, own_generator, own_settings
from regraft.plugins.vlora.train_params import NewGenerator, VloraTrainParams
from regraft.plugins.vlora.train_pictures import published_name, sight_of, tower_for
from regraft.plugins.vlora.widen import PARALLEL, check_widening, mergeable_types

_USUAL_TOKENS = 512
"""Of a row, for the estimate of memory, where the recipe gives no limit."""
_FP32 = 4


@dataclass(frozen=True)
class Aim:
    """What learns, for which model.

    Args:
        architecture: of the language model.
        settings: of the generator.
        source: opens the generator to go on with; None for a new one.
        notes: where it comes from, in words.
    """

    architecture: Architecture
    settings: GeneratorSettings
    source: Callable[[], GeneratorFolder] | None
    notes: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, params: VloraTrainParams) -> Aim:
        """From headers, configs and parameters.

        Raises:
            InputError: a generator, a file of features or the config of the vision encoder is not valid.
            Unsupported: the model does not keep its projections where deltas could act.
            UsageError: sizes contradict each other or the model.
        """
        architecture = architecture_of(checkpoint.config, checkpoint.specs, families=host().architectures())
        own = own_settings(checkpoint) if params.generator is None and params.new is None else None
        if own is None and params.generator is None:
            _refuse_orphan(checkpoint, params)
            settings = _new(architecture, params)
            notes = (f"a new generator: {_words(settings)}", *_parallel(settings, architecture))
            return cls(architecture, settings, None, notes)
        if own is not None:
            settings, source = own, lambda: _found(own_generator(checkpoint))
            label = "the generator of an earlier step"
        else:
            folder = open_generator(str(params.generator))
            settings, source, label = folder.settings, lambda: folder, f"generator {folder.label}"
        check_model(settings, architecture, label)
        settings = _seeing(settings, params)
        notes = (f"{label} goes on: {_words(settings)}", *_parallel(settings, architecture))
        return cls(architecture, settings, source, notes)


def _seeing(settings: GeneratorSettings, params: VloraTrainParams) -> GeneratorSettings:
    """`settings` of a generator that goes on, with the encoder and the hidden state that it now learns from.

    Raises:
        InputError, Unsupported, UsageError: see `tower_for`.
    """
    now: dict[str, Any] = {}
    if params.select_layer is not None:
        now["select_layer"] = params.select_layer
    if params.vision is not None and (tower := tower_for(params, settings)) is not None:
        now["vision_tower"] = published_name(params.vision, tower)
    return settings.model_copy(update=now)


def check(checkpoint: Checkpoint, params: VloraTrainParams) -> None:
    """Refuse what headers and parameters show to be impossible; see `VloraTrain.check`."""
    if "vlora" in checkpoint.config:
        raise Unsupported(
            "the checkpoint has a generator attached already", where=f"{checkpoint.label}: {CONFIG}: vlora",
            remedy="train on the language model that it was attached to, with `generator` to go on",
        )  # fmt: skip
    if params.train == "both":
        refuse_quantised(checkpoint)
    for settings in (params.data, params.held_out):
        if settings is not None:
            check_files(settings)
    if params.images is not None and not params.images.is_dir():
        raise UsageError("there is no such folder", where="images", found=params.images, remedy="check the path")


def outline(checkpoint: Checkpoint, params: VloraTrainParams) -> Outline:
    """The generator's files and, in the second stage, every weight of the language model."""
    aim = Aim.of(checkpoint, params)
    specs = learnable(checkpoint) if params.train == "both" else {}
    generator = aim.settings.num_parameters
    learnt = generator + sum(prod(spec.shape) for spec in specs.values())
    change = config_change(checkpoint, aim.settings)
    named = params.vision is not None or params.features is not None
    return Outline(
        specs=specs,
        json={OWN_CONFIG: change} if change else {},
        files={OWN_WEIGHTS: None},
        notes=aim.notes,
        workspace_bytes=_tower_bytes(params, aim.settings)
        + generator * _FP32
        + training_bytes(checkpoint, learnt, tokens=params.micro_batch * (params.data.max_tokens or _USUAL_TOKENS)),
        shared_bytes=shared_bytes(learnt),
        scratch_bytes=state_bytes(learnt) + generator * _FP32,
        unrecorded=""
        if named or aim.settings.vision_tower is None
        else f"the vision encoder {aim.settings.vision_tower}",
    )


def _refuse_orphan(checkpoint: Checkpoint, params: VloraTrainParams) -> None:
    """Refuse to begin anew unasked where the base was trained together with a generator.

    Raises:
        UsageError: the base has the config of one.
    """
    if OWN_CONFIG in checkpoint.files and params.new is None:
        raise UsageError(
            "the base was made together with a generator, whose weights are not read with it", where="generator",
            found=f"{checkpoint.label}: {OWN_CONFIG}",
            remedy=f'name it to go on: generator = ".../{OWN}"; or give `new` for a new one',
        )  # fmt: skip


def _tower_bytes(params: VloraTrainParams, settings: GeneratorSettings) -> int:
    tower = None if params.vision is None else tower_for(params, settings)
    return 0 if tower is None else tower.nbytes


def _new(architecture: Architecture, params: VloraTrainParams) -> GeneratorSettings:
    sizes = params.new or NewGenerator()
    given = sizes.model_dump(exclude={"types", "every", "separate"})
    sight = sight_of(params)
    return settings_for(
        architecture,
        types=mergeable_types(architecture) if sizes.types is None else sizes.types,
        skip_layers=sizes.every,
        weights_sep=sizes.separate,
        visual_dim=sight.width,
        pos_num=sight.patches,
        vision_tower=sight.tower,
        select_layer=sight.select_layer,
        **given,
    )


def _parallel(settings: GeneratorSettings, architecture: Architecture) -> tuple[str, ...]:
    """What is to be said of type m.

    Raises:
        Unsupported: a mixture of experts, whose MLP is no module of its own.
    """
    if PARALLEL not in settings.types:
        return ()
    if architecture.num_experts:
        raise Unsupported(
            "type m goes around a dense MLP, and this model has experts", where=architecture.model_type,
            found=f"{architecture.num_experts} experts", remedy="leave m out of the generator's types",
        )  # fmt: skip
    try:
        check_widening(architecture)
    except Unsupported as error:
        return (f'type m can be had in output = "attached" alone: {error.found or error.message}',)
    return ()


def _found(folder: GeneratorFolder | None) -> GeneratorFolder:
    assert folder is not None, "the checkpoint of the run is that of the plan"
    return folder


def _words(settings: GeneratorSettings) -> str:
    layers = len(settings.active_layers)
    return (
        f"{settings.num_parameters} numbers, rank {settings.rank}, types {settings.types} of {layers} "
        f"of {settings.num_layers} layers, {settings.pos_num} features of width {settings.visual_dim} an image"
    )
