"""The model whose heads are tried: the one that will be exported, with heads that can be chosen and layers replayed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from regraft.core.architectures import architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.head_file import Head
from regraft.core.host import host
from regraft.core.measures.choices import ChoiceBatch, score_batch
from regraft.core.patch import overlay
from regraft.core.training.modules import layer_modules
from regraft.core.transformation import Run
from regraft.kernels.calibrated_attention import calibrated_attention
from regraft.kernels.calibrated_attention_chunked import Calibration
from regraft.plugins.attention_calibration.aim import Aim
from regraft.plugins.attention_calibration.export import export
from regraft.plugins.attention_calibration.params import AttentionCalibrationParams

_OBSERVED = "regraft_attention_calibration_observed"


class Trial:
    """A calibrated model that computes with the heads it is told.

    Args:
        checkpoint: the base.
        params: of the calibration.
        aim: what is known of the model.
        run: builds it.
    """

    def __init__(self, checkpoint: Checkpoint, params: AttentionCalibrationParams, aim: Aim, run: Run) -> None:
        exported = overlay(checkpoint, export(checkpoint, aim.family, params, ()), by=run.step)
        self.model = run.model(exported, trust_remote_code=True)  # the code is ours
        architecture = architecture_of(checkpoint.config, checkpoint.specs, families=host().architectures())
        self.layers: Sequence[Any] = layer_modules(self.model, architecture)
        self.attention = {
            module.layer_idx: module for module in self.model.modules() if hasattr(module, "act_calibration")
        }
        self.num_heads = aim.num_heads
        settings = next(iter(self.attention.values())).act_calibration
        self.settings = Calibration(*settings)
        if run.device.startswith("cuda"):  # the checkpoint's code is torch alone; here the kernels do the same
            import sys

            sys.modules[type(self.model).__module__].calibrated_chunked = calibrated_attention  # type: ignore[attr-defined]

    @contextmanager
    def with_heads(self, heads: Iterable[Head]) -> Iterator[None]:
        """While this lasts `heads`, and no others, are calibrated."""
        table: dict[int, list[int]] = {}
        for layer, head in sorted(heads):
            table.setdefault(layer, []).append(head)
        try:
            for layer, chosen in table.items():
                self.attention[layer].act_heads = tuple(chosen)
            yield
        finally:
            for layer in table:
                self.attention[layer].act_heads = ()

    def log_probs(self, batch: ChoiceBatch, heads: Iterable[Head] = ()) -> dict[tuple[int, int], float]:
        """Of every option that the batch asks for, with these heads calibrated."""
        with self.with_heads(heads):
            return dict(score_batch(self.model, batch))

    def base(self, batch: ChoiceBatch) -> tuple[dict[tuple[int, int], float], list[Any]]:
        """The same without calibration, and what every layer gave."""
        outputs: list[Any] = []
        with ExitStack() as stack:
            for layer in self.layers:
                hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
                stack.callback(hook.remove)
            found = self.log_probs(batch)
        if len(outputs) != len(self.layers):
            raise Unsupported("the layers do not run one after the other", where=type(self.model).__name__,
                              remedy="give heads, instead of searching for them")  # fmt: skip
        return found, outputs

    def from_layer(self, batch: ChoiceBatch, outputs: Sequence[Any], head: Head) -> dict[tuple[int, int], float]:
        """With one head calibrated: the layers below it give what they gave."""
        with ExitStack() as stack:
            for layer, output in zip(self.layers[: head[0]], outputs, strict=False):
                layer.forward = lambda *args, _given=output, **options: _given
                stack.callback(delattr, layer, "forward")
            return self.log_probs(batch, [head])

    def sink_mass(self, batches: Iterable[ChoiceBatch], heads: Iterable[Head] = ()) -> torch.Tensor:
        """Mean weight on sinks over the rows of all texts, [layers, heads]; of calibrated `heads` what is left there.

        A layer with a sliding window has NaN.
        """
        heads = list(heads)
        mass = torch.zeros(len(self.layers), self.num_heads, dtype=torch.float64)
        rows = torch.zeros(len(self.layers), 1, dtype=torch.float64)
        with torch.no_grad(), self._observed(mass, rows), self.with_heads(heads):
            for batch in batches:
                score_batch(self.model, batch)
        found = mass / rows
        for layer, head in heads:
            found[layer, head] *= self.settings.beta
        return found

    @contextmanager
    def _observed(self, mass: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        config = self.model.config
        name = config._attn_implementation
        inner = ALL_ATTENTION_FUNCTIONS[name]

        def attention(
            module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
        ) -> Any:
            if options.get("sliding_window") is None:
                _, memory = calibrated_attention(
                    query, key, value, self.settings._replace(beta=1.0),
                    mask=None if mask is None else mask[..., : key.shape[2]],
                    scale=options.get("scaling"), softcap=options.get("softcap"),
                )  # fmt: skip
                mass[module.layer_idx] += memory.mass.sum(0).double().cpu()
                rows[module.layer_idx] += memory.real.expand(len(query)).sum().double().cpu()
            return inner(module, query, key, value, mask, **options)

        AttentionInterface.register(_OBSERVED, attention)
        AttentionMaskInterface.register(_OBSERVED, ALL_MASK_ATTENTION_FUNCTIONS[name])
        config._attn_implementation = _OBSERVED
        try:
            yield
        finally:
            config._attn_implementation = name
