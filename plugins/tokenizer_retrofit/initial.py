"""Which method makes the rows of the new tokens, and what it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.tensors import LazyTensor
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.focus import Mixture, focus
from regraft.plugins.tokenizer_retrofit.params import TokenizerRetrofitParams
from regraft.plugins.tokenizer_retrofit.rows import Rows, drawn, mixed, predicted, subtoken_means
from regraft.plugins.tokenizer_retrofit.sources import corpus_of
from regraft.plugins.tokenizer_retrofit.tables import Tables
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary

if TYPE_CHECKING:
    import torch

Role = Literal["embeddings", "head", "bias"]

_BLEND = 0.5
_MATRICES: tuple[Role, ...] = ("embeddings", "head")


@dataclass(eq=False)
class Initial:
    """Makes the rows of each table.

    Args:
        old, new: the vocabularies.
        params: of the step.
        run: its seed.
        tables: the old ones.
    """

    old: TokenizerFile
    new: NewVocabulary
    params: TokenizerRetrofitParams
    run: Run
    tables: Mapping[Role, LazyTensor]

    def rows(self, role: Role) -> Rows:
        """The rows of one table.

        Args:
            role: which one; the head's bias takes means, but from a hypernetwork that predicts it.

        Raises:
            InputError, UsageError, Unsupported: vectors or the donor cannot be used.
        """
        table, origins, method = self.tables[role], self.new.origins, self.params.init
        if method == "hypernet" and (values := self._predicted.get(role)) is not None:
            spelled = {index: place for place, index in enumerate(self._spelled)}
            return predicted(table, origins, spelled, values)
        if method == "subtoken-mean" or role == "bias":
            return subtoken_means(table, origins)
        if method in ("mean", "normal"):
            seed = self.run.seed_for(f"rows of {role}")
            return drawn(table, origins, deviation=float(method == "normal"), seed=seed)
        if method == "omp":
            return mixed(table, origins, self._pursued(role))
        mixture = self._translated if method == "wechsel" else self._focused
        return mixed(table, origins, mixture, _BLEND if method == "blend" else 1.0)

    @cached_property
    def _spelled(self) -> list[int]:
        """New tokens that old ones spell."""
        return [index for index, origin in enumerate(self.new.origins) if origin.kept is None and origin.parts]

    @cached_property
    def _predicted(self) -> dict[Role, torch.Tensor | None]:
        import torch

        from regraft.plugins.tokenizer_retrofit.hypernet import open_hypernet, predict

        assert self.params.hypernet is not None
        network = open_hypernet(self.params.hypernet.folder)
        if network.shape.separate != ("head" in self.tables):
            raise Unsupported(
                "the hypernetwork predicts rows of another kind of head", where=self.params.hypernet.folder,
                expected="a head of its own" if "head" in self.tables else "a head tied to the embeddings",
                remedy="take the network made for this model",
            )  # fmt: skip
        if not self._spelled:
            return {}
        parts = [self.new.origins[index].parts for index in self._spelled]
        table = torch.cat([self.tables[role].load().float() for role in _MATRICES if role in self.tables], dim=1)
        first, second, bias = predict(network, parts, table, self.params.hypernet.language)
        return {"embeddings": first, "head": second, "bias": bias}

    @cached_property
    def _focused(self) -> Mixture:
        return focus(self.new.origins, self._tokens(), seed=self.run.seed_for("auxiliary space"))

    def _tokens(self) -> Iterator[list[int]]:
        corpus = corpus_of(self.params)
        if corpus is None:
            raise UsageError(f'init = "{self.params.init}" learns from a corpus, and none is given', where="corpus",
                             remedy='use init = "subtoken-mean"')  # fmt: skip
        backend = self.new.tokenizer.backend()
        for text in corpus.texts():
            for line in text.splitlines():
                yield backend.encode(line, add_special_tokens=False).ids

    @cached_property
    def _translated(self) -> Mixture:
        import torch

        from regraft.plugins.tokenizer_retrofit.wechsel import aligned, neighbours, read_dictionary, read_vectors

        vectors = self.params.vectors
        assert vectors is not None
        old_words = {index: self._word(self.old, token) for token, index in self.old.vocab.items()}
        new_words = {
            index: self._word(self.new.tokenizer, self.new.tokenizer.tokens[index])
            for index, origin in enumerate(self.new.origins)
            if origin.kept is None and index in self.new.tokenizer.tokens
        }
        pairs = read_dictionary(vectors.dictionary) if vectors.dictionary is not None else []
        old = read_vectors(vectors.source, [*old_words.values(), *(one for one, _ in pairs)])
        new = read_vectors(vectors.target, [*new_words.values(), *(other for _, other in pairs)])
        known = [(old[one], new[other]) for one, other in pairs if one in old and other in new]
        if pairs and not known:
            raise InputError("no pair of the dictionary has vectors", where=vectors.dictionary)
        sides = [torch.tensor(side) for side in zip(*known, strict=True)]
        rotation = aligned(sides[0], sides[1]) if sides else None
        return neighbours(
            {index: new[word] for index, word in new_words.items() if word in new},
            {index: old[word] for index, word in old_words.items() if word in old},
            rotation,
        )

    def _word(self, tokenizer: TokenizerFile, token: str) -> str:
        data = tokenizer.bytes_of(token) if token not in tokenizer.verbatim else None
        try:
            return (data or b"").decode().strip()
        except UnicodeDecodeError:
            return ""

    def _pursued(self, role: Role) -> Mixture:
        from regraft.plugins.tokenizer_retrofit.omp import pursue

        table, ids = donor_table(self.params.donor, role)
        tokenizer, origins = self.new.tokenizer, self.new.origins
        known = {index: ids[token] for token, index in tokenizer.ids.items() if token in ids}
        shared = [index for index in known if origins[index].kept is not None and bool(table[known[index]].any())]
        wanted = [index for index in known if origins[index].kept is None]
        if not shared or not wanted:
            return {}
        atoms = table[[known[index] for index in shared]]
        count = min(self.params.atoms, len(shared))
        self.run.tell(f"{len(wanted)} rows from {len(shared)} shared ones, {count} for each")
        chosen, weights = pursue(atoms, table[[known[index] for index in wanted]], count)
        found: Mixture = {}
        for index, places, shares in zip(wanted, chosen.tolist(), weights.tolist(), strict=True):
            old = [origins[shared[place]].kept for place in places]
            found[index] = ([one for one in old if one is not None], shares)
        return found


def donor_table(donor: Path | None, role: Role) -> tuple[torch.Tensor, dict[str, int]]:
    """The donor's embeddings or head, fp32, and the row of each of its tokens.

    Raises:
        InputError: the donor is no checkpoint, or has ids beyond its rows.
    """
    from regraft.core.sources.open import open_checkpoint

    if donor is None or not donor.is_dir():
        raise UsageError('init = "omp" takes rows of a donor\'s checkpoint', where="donor", found=donor,
                         remedy="name a folder with weights and tokenizer.json")  # fmt: skip
    checkpoint: Checkpoint = open_checkpoint(donor)
    tokenizer = TokenizerFile.of(checkpoint)
    tables = Tables.of(checkpoint, tokenizer)
    name = tables.head if role == "head" and tables.head is not None else tables.embeddings
    return checkpoint.load(name).float(), dict(tokenizer.ids)
