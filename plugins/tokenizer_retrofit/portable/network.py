"""A hypernetwork of Zero-Shot Tokenizer Transfer (Minixhofer, Ponti, Vulić, arXiv 2405.07883, section 4), in torch.

The rows that spell a token run through a small RoBERTa, and its first state becomes the row of the token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

_AT_ONCE = 1024
_OWN_EPS, _BODY_EPS = 1e-6, 1e-5
"""Of layer norms outside of RoBERTa's body, and in it."""


class Network:
    """Predicts rows of the embeddings.

    Args:
        shape: width, longest, vocabulary, extra, padding, heads, layers, separate, concatenated, rescaled, languages;
            and `language`, the number of the one that is read.
        weights: fp32, by the names of the published networks.
        model: whose rows are read.

    Raises:
        ValueError: the network reads rows of a head of its own, and the model has none.
    """

    def __init__(self, shape: Mapping[str, Any], weights: Mapping[str, torch.Tensor], model: Any) -> None:
        self.shape = shape
        self.weights = dict(weights)
        self.modules = [model.get_input_embeddings()]
        if shape["separate"]:
            self.modules.append(model.get_output_embeddings())
        if any(module is None for module in self.modules):
            raise ValueError("the hypernetwork reads rows of the head, and this model has no head")

    @torch.no_grad()
    def rows(self, spelled: Mapping[bytes, tuple[int, ...]]) -> dict[bytes, torch.Tensor]:
        """The row [width] of each token, fp32."""
        if not spelled:
            return {}
        made = [self._predict(piece) for piece in torch.split(self._pieces(list(spelled.values())), _AT_ONCE)]
        return dict(zip(spelled, torch.cat(made), strict=True))

    def _pieces(self, spellings: Sequence[Sequence[int]]) -> torch.Tensor:
        """[n, longest] ids; longer spellings are cut to what the network reads."""
        longest: int = self.shape["longest"]
        pieces = torch.full((len(spellings), longest), self.shape["padding"])
        for row, parts in zip(pieces, spellings, strict=True):
            cut = torch.tensor(parts[:longest])
            row[: len(cut)] = cut
        return pieces

    def _predict(self, pieces: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        device = self.modules[0].weight.device
        pieces = pieces.to(device)
        if self.weights["fallback_embeddings.weight"].device != device:
            self.weights = {name: tensor.to(device) for name, tensor in self.weights.items()}
        old = pieces.clamp(max=shape["vocabulary"] - 1)
        rows = torch.cat([module.weight[old].float() for module in self.modules], dim=-1)
        if shape["rescaled"]:
            rows = rows * self.weights["in_scaler.w"] + self.weights["in_scaler.b"]
        own = self.weights["fallback_embeddings.weight"][(pieces - shape["vocabulary"]).clamp(0, shape["extra"] - 1)]
        states = torch.where((pieces >= shape["vocabulary"])[..., None], own, rows)
        states = self._block(self._linear(states, "input_projection.0"), "input_projection.1")
        mask = pieces != shape["padding"]
        if shape["languages"]:
            states, mask = self._with_language(states, mask)
        states = self._body(states, mask)
        last = states.flatten(1) if shape["concatenated"] else states[:, 0]
        made = self._linear(self._block(last, "output_projection.0"), "output_projection.1")[:, : shape["width"]]
        return made * self.weights["scaler.w"] + self.weights["scaler.b"] if shape["rescaled"] else made

    def _with_language(self, states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One more position, for the language; what the body adds to a position is taken off it beforehand."""
        prefix = "model.embeddings."
        added = self.weights[f"{prefix}token_type_embeddings.weight"][0]
        added = added + self.weights[f"{prefix}position_embeddings.weight"][mask.shape[1]]
        vector = self.weights["lang_embeddings.weight"][self.shape["language"]] - added
        states = torch.cat([states, vector.expand(len(states), 1, -1)], dim=1)
        return states, torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)

    def _body(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        prefix = "model.embeddings."
        states = states + self.weights[f"{prefix}token_type_embeddings.weight"][0]
        states = states + self.weights[f"{prefix}position_embeddings.weight"][: states.shape[1]]
        states = self._norm(states, f"{prefix}LayerNorm", _BODY_EPS)
        for layer in range(self.shape["layers"]):
            name = f"model.encoder.layer.{layer}."
            mixed = self._linear(
                self._attention(states, mask, f"{name}attention.self."), f"{name}attention.output.dense"
            )
            states = self._norm(states + mixed, f"{name}attention.output.LayerNorm", _BODY_EPS)
            inner = F.gelu(self._linear(states, f"{name}intermediate.dense"))
            states = self._norm(
                states + self._linear(inner, f"{name}output.dense"), f"{name}output.LayerNorm", _BODY_EPS
            )
        return states

    def _attention(self, states: torch.Tensor, mask: torch.Tensor, name: str) -> torch.Tensor:
        query, key, value = (
            self._linear(states, name + part).view(*mask.shape, self.shape["heads"], -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return mixed.transpose(1, 2).flatten(2)

    def _block(self, x: torch.Tensor, name: str) -> torch.Tensor:
        inner = F.gelu(self._linear(x, f"{name}.dense1"), approximate="tanh")
        return self._norm(x + F.gelu(self._linear(inner, f"{name}.dense2"), approximate="tanh"), f"{name}.ln", _OWN_EPS)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)
