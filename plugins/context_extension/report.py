"""The figures of an extension: base, wavelengths, the logit scale, and how far the staircase is from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from regraft.plugins.context_extension.math import (
    deviation,
    entropy_scale,
    fit_beta,
    longest_wavelength,
    paper_beta,
)
from regraft.plugins.context_extension.params import ContextExtensionParams
from regraft.plugins.context_extension.rope import Rope


def native_slope(params: ContextExtensionParams, window: int) -> float:
    """The slope of the staircase that `params.beta` asks for."""
    if params.beta == "paper":
        return paper_beta(window)
    if params.beta == "fit":
        return fit_beta(window, params.target_length)
    return params.beta


def figures_of(before: Rope, after: Rope, window: int, params: ContextExtensionParams) -> dict[str, Any]:
    """The metrics of the patch; lengths and wavelengths in positions.

    Args:
        before, after: rotary parameters.
        window: c, the length the model was trained on.
        params: the step's.
    """
    target = params.target_length
    figures: dict[str, Any] = {
        "original_length": window,
        "target_length": target,
        "extension_factor": target / window,
        "rope_theta_before": before.theta,
        "rope_theta": after.theta,
        "rotary_dimensions": before.dim,
        "longest_wavelength_before": longest_wavelength(before.parameters, before.dim),
        "longest_wavelength": longest_wavelength(after.parameters, after.dim),
    }
    if params.scales_logits:
        multiples = [2**k for k in range(1, max(2, (target // window).bit_length()))]
        figures["logit_scale_at"] = {f"{m}x": entropy_scale(m * window - 1, window) for m in multiples}
        figures["layers_skipped"] = params.layers_skipped
    if params.scales_logits and params.export == "native":
        beta = native_slope(params, window)
        largest, mean = deviation(window, target, beta)
        figures |= {
            "native_beta": beta,
            "native_max_deviation": largest,
            "native_mean_deviation": mean,
            "native_deviation_bound": math.log(2) / math.log(window),
        }
    if params.logit_scale is not None:
        figures["folded_logit_scale"] = params.logit_scale
    return figures


def figure_notes(figures: Mapping[str, Any]) -> list[str]:
    """The figures that decide whether the result is what was wanted, in words."""
    base = f"base {figures['rope_theta_before']:.10g} -> {figures['rope_theta']:.10g}"
    turns = f"{figures['longest_wavelength_before']:.0f} -> {figures['longest_wavelength']:.0f} positions"
    length = f"context {figures['original_length']} -> {figures['target_length']}"
    if "local_branch" in figures:
        first = f"the first {figures['global_branch']} as if they were {figures['limit_distance']} away"
        return [f"{length}: a token sees the last {figures['local_branch']} tokens, and {first}"]
    notes = [f"{length}, {base}, longest wavelength {turns}"]
    if "logit_scale_at" in figures:
        scales = ", ".join(f"{scale:.3f} at {multiple}" for multiple, scale in figures["logit_scale_at"].items())
        notes.append(f"logits beyond the old window are scaled by {scales}")
    if "native_beta" in figures:
        notes.append(
            f"the staircase of the stock class (slope {figures['native_beta']:.4f}) is off that scale by at most "
            f"{figures['native_max_deviation']:.3f}, {figures['native_mean_deviation']:.3f} on average"
        )
    return notes
