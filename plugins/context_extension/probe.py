"""What `probe` measures of a model before and after, and its report. It reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.measures.passkey import Passkeys
from regraft.core.measures.prose import passage, sentences
from regraft.core.patch import Patch
from regraft.core.training.modes import bf16_is_fast
from regraft.core.transformation import Run
from regraft.plugins.context_extension.entropy import Curves, curves, entropy_figures, entropy_reports
from regraft.plugins.context_extension.model import model_of
from regraft.plugins.context_extension.settings import ProbeSettings
from regraft.plugins.context_extension.sweep import Sweep, sweep, sweep_figures, sweep_reports

_SHORT_CODES = frozenset({"BF16", "F16"})


@dataclass
class Probe:
    """Measures models one after the other, with the same texts.

    Args:
        settings: what is measured.
        tokenizer: of the checkpoint.
        window: the length the model was trained on.
        target: the length it is extended to.
        run: of the step.
    """

    settings: ProbeSettings
    tokenizer: Any
    window: int
    target: int
    run: Run
    entropies: dict[str, Curves] = field(default_factory=dict)
    sweeps: dict[str, Sweep] = field(default_factory=dict)

    def measure(self, name: str, checkpoint: Checkpoint, patch: Patch | None = None) -> None:
        """Measure the model of `checkpoint`; `name` is what reports call it.

        Args:
            name: `before` or `after`.
            checkpoint: with `patch` laid over it.
            patch: as for `model_of`.

        Raises:
            RegraftError: see `ContextExtension.apply`.
        """
        self._tell(name, "loading the model")
        model = model_of(checkpoint, self.run, patch, dtype=self._dtype(checkpoint))
        if self.settings.entropy:
            self.entropies[name] = curves(model, self._texts(name), self.target)
        if self.settings.passkey:
            passkeys = Passkeys(self.tokenizer, self.settings, self.run.seed_for("passkey"), "probe.")
            lengths = self.settings.lengths_for(self.target)
            self.sweeps[name] = sweep(model, passkeys, lengths, lambda text: self._tell(name, text))

    def figures(self) -> dict[str, Any]:
        """For the metrics."""
        figures: dict[str, Any] = {}
        if self.entropies:
            figures["entropy"] = entropy_figures(self.entropies, self.window)
        if self.sweeps:
            figures["passkey"] = sweep_figures(self.sweeps, self.window)
        return figures

    def reports(self) -> dict[str, FileRef]:
        """Tables and plots."""
        reports = entropy_reports(self.entropies) if self.entropies else {}
        return reports | (sweep_reports(self.sweeps, self.settings) if self.sweeps else {})

    def notes(self) -> list[str]:
        """The figures in words."""
        figures = self.figures()
        return [*self._entropy_notes(figures.get("entropy")), *self._passkey_notes(figures.get("passkey"))]

    def _entropy_notes(self, figures: Any) -> Iterator[str]:
        if figures:
            rises = [f"{one['at_window']:.2f} -> {one['at_target']:.2f} {name}" for name, one in figures.items()]
            layers = next(iter(self.entropies.values())).averaged
            places = f"from position {self.window} to {self.target}"
            yield f"attention entropy {places}, mean of {layers}, in nats: {', '.join(rises)}"

    def _passkey_notes(self, figures: Any) -> Iterator[str]:
        for where in ("inside", "beyond"):
            shares = [f"{one[where]['likeliest']:.0%} {name}" for name, one in (figures or {}).items() if one[where]]
            if shares:
                choices = self.settings.choices
                place = f"in texts {where} the old window of {self.window} tokens"
                chance = f"chance: {1 / choices:.0%}"
                yield f"the passkey is the likeliest of {choices} keys {place}: {', '.join(shares)} ({chance})"

    def _texts(self, name: str) -> Iterator[list[int]]:
        for number in range(self.settings.samples):
            self._tell(name, f"attention entropy, text {number + 1} of {self.settings.samples}")
            random = Random(f"{self.run.seed_for('entropy')}/{number}")
            yield passage(self.tokenizer, sentences(random, self.settings.text), self.target)

    def _dtype(self, checkpoint: Checkpoint) -> str:
        """As stored where the device is fast at it; never more precise than asked for, and float32 where in doubt."""
        if self.settings.precision != "auto":
            return self.settings.precision
        short = all(spec.dtype in _SHORT_CODES for spec in checkpoint.specs.values())
        return "bfloat16" if short and bf16_is_fast(self.run.device) else "float32"

    def _tell(self, name: str, text: str) -> None:
        self.run.tell(f"probe {name}: {text}")
