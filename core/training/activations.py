"""What a model computes inside at chosen places, one vector a prompt: by hooks, in batches, kept on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from regraft.core.architectures import Architecture
from regraft.core.errors import InputError
from regraft.core.training.head import Head
from regraft.core.training.model import memory
from regraft.core.training.modes import reproducible, without_dropout
from regraft.core.training.modules import layer_modules, role_module

Kind = Literal["residual", "attn_out", "mlp_out", "head"]
Position = Literal["last", "mean"]

_PROBE = 1.0
"""Added to every unit of an MLP output to see what the residual stream behind the layer makes of it."""
_TOLERANCE = 0.1
"""Of the median unit: large enough for bfloat16, and norms and multipliers are off by far more."""


@dataclass(frozen=True, order=True)
class Site:
    """A place in a layer.

    `residual` is the residual stream behind the layer, [hidden_size]; `attn_out` and `mlp_out` are the outputs of
    o_proj and down_proj, before any norm or multiplier, [hidden_size]; `head` is what every query head gives to
    o_proj, [num_heads, head_dim].
    """

    layer: int
    kind: Kind


@dataclass(frozen=True)
class Activations:
    """Activations of N prompts.

    Args:
        values: by site, [N, ...] in fp32.
        entropies: [N] in float64, of the next token after each prompt, in nats; None if they were not asked for.
    """

    values: Mapping[Site, torch.Tensor]
    entropies: torch.Tensor | None = None


@dataclass(frozen=True)
class Probe:
    """A model whose activations are taken.

    Args:
        model: a causal language model of transformers, in eval mode.
        architecture: its roles.
        batch_size: prompts that run together.
        position: `last` takes a prompt's last token; `mean` the mean over its tokens, the first of which counts only
            if it is the only one: there many models keep values a hundred times larger, whatever the prompt.
        tell: is called with the number of prompts done, after every batch.
    """

    model: Any
    architecture: Architecture
    batch_size: int = 8
    position: Position = "last"
    tell: Callable[[int], None] = field(default=lambda done: None, compare=False)

    def take(
        self,
        sites: Sequence[Site],
        prompts: Sequence[Sequence[int]],
        *,
        entropy: bool = False,
        answers: Sequence[int] | None = None,
    ) -> Activations:
        """The activations of `prompts`, token ids, at `sites`.

        Prompts of a batch are padded on the right, where causal attention does not look: no prompt sees another.

        Args:
            sites: where.
            prompts: at least one, with at least one token each.
            entropy: also of the distribution of the next token.
            answers: ids; the entropy is that of the distribution over these tokens alone, made to sum to one.

        Raises:
            Unsupported: the model has no such module.
            InputError: an activation is not finite.
            ResourceError: out of memory.
        """
        head = Head.of(self.model, fused=entropy)
        rows: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
        entropies: list[torch.Tensor] = []
        device = next(self.model.parameters()).device
        with torch.no_grad(), without_dropout(self.model), reproducible(device), memory("measuring activations"):
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                ids, lengths = _padded(batch, device)
                with self._hooked(rows, lengths):
                    logits = _logits(head, ids, lengths - 1) if entropy else head.hidden(ids)
                if entropy:
                    entropies.append(next_token_entropy(logits, answers).cpu())
                self.tell(start + len(batch))
        values = {site: torch.cat(taken) for site, taken in rows.items()}
        for site, taken in values.items():
            _check_finite(site, taken)
        return Activations(values, torch.cat(entropies) if entropy else None)

    def mlp_adds_to_residual(self, layer: int, ids: Sequence[int]) -> bool:
        """Whether a constant in the MLP output of `layer` is the same constant in the residual stream behind it.

        Tried on the tokens `ids`, not assumed from the class: norms behind the MLP and multipliers show.
        """
        change = self._residual(layer, ids, _PROBE) - self._residual(layer, ids, 0.0)
        return bool((change - _PROBE).abs().median() <= _TOLERANCE * _PROBE)

    def _residual(self, layer: int, ids: Sequence[int], shift: float) -> torch.Tensor:
        """The residual stream [1, T, hidden_size] behind `layer`, with `shift` added to its MLP output."""
        tokens = torch.tensor([list(ids)], device=next(self.model.parameters()).device)
        module, seen = self._module(Site(layer, "mlp_out")), list[torch.Tensor]()
        with ExitStack() as stack:
            stack.callback(module.register_forward_hook(lambda module, inputs, output: output + shift).remove)
            stack.callback(self._listen(Site(layer, "residual"), lambda found: seen.append(found.float().clone())))
            stack.enter_context(memory("measuring activations"))
            with torch.no_grad(), without_dropout(self.model):
                self.model(input_ids=tokens, use_cache=False)
        return seen[0]

    @contextmanager
    def _hooked(self, rows: Mapping[Site, list[torch.Tensor]], lengths: torch.Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for site, taken in rows.items():
                stack.callback(self._listen(site, self._collector(taken, lengths)))
            yield

    def _collector(self, taken: list[torch.Tensor], lengths: torch.Tensor) -> Callable[[torch.Tensor], object]:
        return lambda found: taken.append(self._pooled(found, lengths))

    def _pooled(self, found: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] to [B, ...] in fp32 on the CPU."""
        if self.position == "last":
            return found[torch.arange(len(found), device=found.device), lengths - 1].float().cpu()
        place, more = torch.arange(found.shape[1], device=found.device)[None], [1] * (found.dim() - 2)
        inside = (place < lengths[:, None]) & ((place > 0) | (lengths[:, None] == 1))
        total = (found.float() * inside.view(*inside.shape, *more)).sum(1)
        return (total / inside.sum(1).view(-1, *more)).cpu()

    def _listen(self, site: Site, take: Callable[[torch.Tensor], object]) -> Callable[[], None]:
        """Hand the activations [B, T, ...] of `site` to `take` in every forward pass; returns what ends it."""
        heads, size = self.architecture.num_heads, self.architecture.head_dim

        def before(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            take(inputs[0].reshape(*inputs[0].shape[:-1], heads, size))

        def after(module: Any, inputs: Any, output: Any) -> None:
            take(output[0] if isinstance(output, tuple) else output)

        module = self._module(site)
        handle = (
            module.register_forward_pre_hook(before) if site.kind == "head" else module.register_forward_hook(after)
        )
        end: Callable[[], None] = handle.remove
        return end

    def _module(self, site: Site) -> Any:
        if site.kind == "residual":
            return layer_modules(self.model, self.architecture)[site.layer]
        role = "down_proj" if site.kind == "mlp_out" else "o_proj"
        return role_module(self.model, self.architecture, role, site.layer)


def next_token_entropy(logits: torch.Tensor, answers: Sequence[int] | None = None) -> torch.Tensor:
    """H = -Σ p ln p of softmax(logits), [B] in nats, in float64.

    Args:
        logits: [B, vocabulary].
        answers: ids; p is then the distribution over these tokens alone.
    """
    chosen = logits if answers is None else logits[:, list(answers)]
    log_p = chosen.double().log_softmax(-1)
    return -(log_p.exp() * log_p).nansum(-1)  # 0 · ln 0 is 0


def _logits(head: Head, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Logits [B, vocabulary] in fp32 behind the tokens `last`; those of other tokens only where they must be made."""
    rows = torch.arange(len(ids), device=ids.device)
    if not head.fused:
        whole: torch.Tensor = head.model(input_ids=ids, use_cache=False).logits[rows, last].float()
        return whole
    bias = getattr(head.module, "bias", None)
    states = head.hidden(ids)[rows, last].float()
    logits = torch.nn.functional.linear(states, head.module.weight.float(), None if bias is None else bias.float())
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] ids, zeros on the right, and [B] lengths."""
    lengths = [len(prompt) for prompt in prompts]
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(list(prompt))
    return ids.to(device), torch.tensor(lengths, device=device)


def _check_finite(site: Site, values: torch.Tensor) -> None:
    bad = (~torch.isfinite(values)).flatten(1).any(1)
    if bool(bad.any()):
        raise InputError(
            "an activation is not finite",
            where=f"{site.kind} of layer {site.layer}",
            expected="numbers",
            found=f"NaN or Inf in {int(bad.sum())} of {len(values)} prompts",
            remedy='check the weights with --strict, or compute in dtype = "float32"',
        )
