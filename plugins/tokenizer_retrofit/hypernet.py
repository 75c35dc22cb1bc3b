"""Rows by a hypernetwork, as in Zero-Shot Tokenizer Transfer (Minixhofer, Ponti, Vulić, arXiv 2405.07883), section 4.

The rows of the old tokens that spell a new one run through a small transformer, whose first state becomes the new row
of the embeddings and, where the head is its own, of the head. Written from the paper; the names of the weights are
those of the published networks, so their folders (`config.json`, `model.safetensors`) can be read. Tokens that both
vocabularies share keep their rows, where the paper predicts these too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.core.errors import InputError, Unsupported
from regraft.core.jsonio import read_object
from regraft.core.tensors import WeightFile

_AT_ONCE = 1024
_UNSUPPORTED = ("hn_add_inter_token_attention", "hn_embed_target_priors")


@dataclass(frozen=True)
class Shape:
    """What config.json says.

    Args:
        width: of one row of the model's tables.
        separate: whether rows of the head are predicted too, and read beside those of the embeddings.
        hidden, intermediate, layers, heads: of the network.
        longest: pieces of a token that it reads.
        vocabulary: old ids below are rows of the model; ids from there on are the network's own.
        extra: how many of its own it has.
        padding: the id that stands for nothing.
        languages: of which one is read too; 0 for none.
        single_head, concatenated, rescaled, biased: forms of the output.
    """

    width: int
    separate: bool
    hidden: int
    intermediate: int
    layers: int
    heads: int
    longest: int
    vocabulary: int
    extra: int
    padding: int
    languages: int = 0
    single_head: bool = False
    concatenated: bool = False
    rescaled: bool = False
    biased: bool = False

    @property
    def read(self) -> int:
        """Numbers of a piece that enter."""
        return 2 * self.width if self.separate else self.width

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> Shape:
        """From the keys of a published config.

        Raises:
            InputError: a key is missing.
            Unsupported: another kind of network.
        """
        if config.get("hn_model_type", "roberta") != "roberta" or any(config.get(key) for key in _UNSUPPORTED):
            raise Unsupported("this kind of hypernetwork is not known", where=where, expected="hn_model_type roberta")
        try:
            hidden = int(config["hn_hidden_size"])
            return cls(
                width=int(config["n_embd"]), separate=bool(config.get("separate_out_embeddings", False)),
                hidden=hidden, intermediate=int(config["hn_intermediate_size"]), layers=int(config["hn_n_layers"]),
                heads=int(config.get("hn_num_attention_heads") or hidden // 64),
                longest=int(config["hn_surface_maxlen"]), vocabulary=int(config["original_vocab_size"]),
                extra=max(int(config.get("hn_n_extra_tokens", 0)), 1), padding=int(config["pad_token_id"]),
                languages=int(config.get("n_langs") or 0) if config.get("hn_embed_lang_id") else 0,
                single_head=bool(config.get("hn_single_head", False)),
                concatenated=bool(config.get("hn_concat_last_hidden_state", False)),
                rescaled=bool(config.get("hn_rescale_embeddings", False)),
                biased=bool(config.get("hn_predict_bias", False)),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("is no config of a hypernetwork", where=where, found=repr(error)) from None


class Scale(nn.Module):
    """w x + b, entry by entry."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, width))
        self.b = nn.Parameter(torch.zeros(1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same."""
        return self.w * x + self.b


class Block(nn.Module):
    """LayerNorm(x + gelu(W2 gelu(W1 x)))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense1 = nn.Linear(width, inner)
        self.dense2 = nn.Linear(inner, width)
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same."""
        gelu = nn.GELU(approximate="tanh")
        changed: torch.Tensor = self.ln(x + gelu(self.dense2(gelu(self.dense1(x)))))
        return changed


class Hypernet(nn.Module):
    """Predicts rows from pieces."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from transformers import RobertaConfig, RobertaModel

        self.shape = shape
        body = RobertaConfig(
            vocab_size=shape.padding + 1, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, max_position_embeddings=514,
            type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=shape.padding, attn_implementation="eager",
        )  # fmt: skip
        self.model = RobertaModel(body, add_pooling_layer=False)
        self.fallback_embeddings = nn.Embedding(shape.extra, shape.read)
        self.input_projection = nn.Sequential(
            nn.Linear(shape.read, shape.hidden), Block(shape.hidden, shape.intermediate)
        )
        last = shape.hidden * (shape.longest + bool(shape.languages) if shape.concatenated else 1)
        out = shape.read if shape.single_head else shape.width
        self.output_projection = nn.Sequential(Block(last, shape.intermediate), nn.Linear(last, out))
        if shape.separate and not shape.single_head:
            self.output_projection_out = nn.Sequential(Block(last, shape.intermediate), nn.Linear(last, shape.width))
        if shape.rescaled:
            self.in_scaler, self.scaler = Scale(shape.read), Scale(shape.width)
            if shape.separate:
                self.out_scaler = Scale(shape.width)
        if shape.languages:
            self.lang_embeddings = nn.Embedding(shape.languages, shape.hidden)
        if shape.biased:
            self.bias_projection = nn.Linear(last, 1)

    def forward(
        self, pieces: torch.Tensor, table: torch.Tensor, language: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Rows of the embeddings [n, width], of the head, and the head's biases [n]; None for what it does not predict.

        Args:
            pieces: [n, longest] ids, filled up with the padding id.
            table: [vocabulary, read] the model's rows.
            language: which one, where the network reads it.
        """
        shape = self.shape
        rows = table[pieces.clamp(max=shape.vocabulary - 1)]
        rows = self.in_scaler(rows) if shape.rescaled else rows
        own = self.fallback_embeddings((pieces - shape.vocabulary).clamp(0, shape.extra - 1))
        states = self.input_projection(torch.where((pieces >= shape.vocabulary)[..., None], own, rows))
        mask = pieces != shape.padding
        if shape.languages:
            states, mask = self._with_language(states, mask, language)
        positions = torch.arange(mask.shape[1]).expand(mask.shape)
        states = self.model(inputs_embeds=states, attention_mask=mask.long(), position_ids=positions).last_hidden_state
        last = states.flatten(1) if shape.concatenated else states[:, 0]
        first = self.output_projection(last)
        second = None
        if shape.separate:
            second = first[:, shape.width :] if shape.single_head else self.output_projection_out(last)
        first = first[:, : shape.width]
        if shape.rescaled:
            first = self.scaler(first)
            second = self.out_scaler(second) if second is not None else None
        return first, second, self.bias_projection(last)[:, 0] if shape.biased else None

    def _with_language(
        self, states: torch.Tensor, mask: torch.Tensor, language: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One more position, for the language; what the body adds to a position is taken off it beforehand."""
        if language is None:
            raise InputError("the hypernetwork reads a language, and none is given", where="hypernet.language",
                             expected=f"0 to {self.shape.languages - 1}")  # fmt: skip
        embeddings: Any = self.model.embeddings
        added = embeddings.token_type_embeddings.weight[0] + embeddings.position_embeddings.weight[mask.shape[1]]
        vector = (self.lang_embeddings.weight[language] - added).expand(len(states), 1, -1)
        return torch.cat([states, vector], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


def open_hypernet(folder: Path) -> Hypernet:
    """From a folder with config.json and model.safetensors.

    Raises:
        InputError: a file is missing or malformed, or weights are missing or of another shape.
        Unsupported: another kind of network.
    """
    config, weights = folder / "config.json", folder / "model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise InputError("the hypernetwork's folder lacks a file", where=folder, expected=file.name)
    network = Hypernet(Shape.of(read_object(config), str(config)))
    stored = {name: tensor.load().float() for name, tensor in WeightFile(weights).tensors().items()}
    wanted = network.state_dict()
    for name, tensor in wanted.items():
        if name.endswith(("position_ids", "token_type_ids", "word_embeddings.weight")):
            stored[name] = tensor
        elif name not in stored or stored[name].shape != tensor.shape:
            found = list(stored[name].shape) if name in stored else "nothing"
            raise InputError("the hypernetwork's weights do not fit its config", where=f"{weights}: {name}",
                             expected=list(tensor.shape), found=found)  # fmt: skip
    network.load_state_dict({name: stored[name] for name in wanted})
    return network.eval().requires_grad_(False)


def predict(
    network: Hypernet, spellings: Sequence[Sequence[int]], table: torch.Tensor, language: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Rows for tokens that the old ids in `spellings` spell; longer ones are cut to what the network reads.

    Args:
        network: from `open_hypernet`.
        spellings: old ids of each token.
        table: [rows, read] embeddings, with the head's rows beside them where the network reads both.
        language: see `Hypernet`.

    Raises:
        InputError: the network is for another model.
    """
    shape = network.shape
    if table.shape[1] != shape.read or len(table) < shape.vocabulary:
        raise InputError(
            "the hypernetwork was made for another model", where="hypernet",
            expected=f"at least {shape.vocabulary} rows of {shape.read} numbers", found=list(table.shape),
            remedy="a network with separate_out_embeddings is for a head of its own, any other for a tied one",
        )  # fmt: skip
    pieces = torch.full((len(spellings), shape.longest), shape.padding)
    for row, parts in zip(pieces, spellings, strict=True):
        cut = torch.tensor(parts[: shape.longest], dtype=torch.int64)
        row[: len(cut)] = cut
    with torch.no_grad():
        made = [network(piece, table.float(), language) for piece in torch.split(pieces, _AT_ONCE)]
    joined = [
        torch.cat([one[place] for one in made]) if made and made[0][place] is not None else None for place in range(3)
    ]
    assert joined[0] is not None
    return joined[0], joined[1], joined[2]
