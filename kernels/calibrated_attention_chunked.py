"""Attention calibration in torch, some query rows at a time: nothing of size queries x keys is held.

Legend: B batch, H query heads, G key heads (H a multiple of G), L queries, K keys, d width of a head, m rows at a time.
With A[p, k] the weights of softmax attention, p real rows (no padding), i_0 the first real key:

    c[k] = sum of A[p, k] over the rows that see k        n[k] = how many rows those are
    Z    = keys with c[k] / n[k] > threshold, n[k] >= min_queries, k != i_0 if spare_first
    s[p] = sum of A[p, k] over Z                          g[p] = (1 - beta s[p]) / (1 - s[p])
    A'   = beta A on Z, g A elsewhere: rows still sum to 1

The scope `causal` takes c and n over the rows up to p, so that Z belongs to the row and nothing looks ahead; `prompt`
takes all rows of the prompt, and one Z, which stays as it is while tokens follow one by one. The threshold is tau, or
tau divided by the number of keys in sight. A row whose weight lies on Z but for less than 1e-20 stays as it is.

The file needs torch alone: it is also the body of the modeling file that checkpoints carry.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

PIECE_ELEMENTS = 1 << 21
"""Weights of a piece, all its heads together: 8 MB in fp32, or 32 rows; half or double is slower by a tenth."""
_MOST_ROWS, _ROWS, _FEW = 256, 128, 16
_TOO_LITTLE, _CANCELS = 1e-20, 0.03
"""Where less than the second is left beside the sinks it is summed anew: 1 - s has lost its digits."""


class Calibration(NamedTuple):
    """Which keys are sinks, and what becomes of their weight; see the head of this file."""

    beta: float = 0.4
    tau: float = 0.1
    relative: bool = False
    causal: bool = True
    min_queries: int = 4
    spare_first: bool = True


class Memory(NamedTuple):
    """What later rows need to know of earlier ones.

    Args:
        sums: c [B, H, K], fp32 or wider.
        counts: n [B, K].
        mass: [B, H] sums of s over the real rows; divided by `real` the mean weight on sinks.
        sinks: Z [B, H, K] of the scope `prompt`; None of the other.
        real, rows: rows so far, [B] without and with padding.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
    real: torch.Tensor
    sinks: torch.Tensor | None
    rows: int


Mixed = tuple[torch.Tensor, Memory]


class Sight:
    """Which keys rows see. Rows stand at the positions `offset`, `offset` + 1, ... of the keys."""

    def __init__(
        self, padding: torch.Tensor | None, mask: torch.Tensor | None, offset: int, keys: torch.Tensor
    ) -> None:
        self.padding, self.mask, self.offset, self.device, self.batch = padding, mask, offset, keys.device, len(keys)
        self.ranks = None if padding is None else padding.cumsum(-1)

    def first(self) -> torch.Tensor:
        """[B] the first real key."""
        if self.mask is not None:
            return _seen(self.mask[:, 0, -1]).int().argmax(-1).expand(self.batch)
        if self.padding is not None:
            return self.padding.int().argmax(-1)
        return torch.zeros(self.batch, dtype=torch.int64, device=self.device)

    def hide(self, scores: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Scores [B, H, m, keys] of rows start to stop, in place: -inf where a key is not seen."""
        end = scores.shape[-1]
        if self.mask is not None:
            part = self.mask[..., start:stop, :end]
            return scores.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else scores.add_(part)
        own = min(self.offset + start, end)
        unseen = torch.ones(stop - start, end - own, dtype=torch.bool, device=self.device)
        scores[..., own:].masked_fill_(unseen.triu(self.offset + start - own + 1), -torch.inf)
        return scores if self.padding is None else scores.masked_fill_(~self.padding[:, None, None, :end], -torch.inf)

    def real(self, start: int, stop: int) -> torch.Tensor:
        """[B, m] 1 for rows that are no padding."""
        positions = torch.arange(self.offset + start, self.offset + stop, device=self.device)
        if self.mask is not None:
            return _seen(self.mask[:, 0, positions - self.offset, positions]).expand(self.batch, -1)
        if self.padding is not None:
            return self.padding[:, positions]
        return torch.ones(1, 1, dtype=torch.bool, device=self.device).expand(self.batch, stop - start)

    def sees(self, start: int, stop: int, columns: torch.Tensor) -> torch.Tensor:
        """[B or 1, m, u] True where a row sees the key of a column."""
        if self.mask is not None:
            return _seen(self.mask[:, 0, start:stop][..., columns])
        rows = torch.arange(self.offset + start, self.offset + stop, device=self.device)
        seen = (columns[None] <= rows[:, None])[None]
        return seen if self.padding is None else seen & self.padding[:, None, columns]

    def counted(self, start: int, stop: int, columns: torch.Tensor) -> torch.Tensor:
        """[B, m, u] likewise, of rows that are no padding."""
        return self.sees(start, stop, columns) & self.real(start, stop)[..., None]

    def in_sight(self, start: int, stop: int) -> torch.Tensor:
        """[B or 1, m] how many keys a row sees, at least 1."""
        rows = torch.arange(self.offset + start, self.offset + stop, device=self.device)
        if self.mask is not None:
            return _seen(self.mask[:, 0, start:stop]).sum(-1).clamp_min(1)
        return (rows + 1)[None] if self.ranks is None else self.ranks[:, rows].clamp_min(1)


def calibrated_chunked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, calibration: Calibration, *,
    padding: torch.Tensor | None = None, mask: torch.Tensor | None = None, offset: int = 0,
    scale: float | None = None, softcap: float | None = None, memory: Memory | None = None, rows: int | None = None,
) -> Mixed:  # fmt: skip
    """Calibrated causal attention of all given heads, and what the rows that follow need.

    Args:
        query, key, value: [B, H, L, d], [B, G, K, d] rotated as the queries, [B, G, K, e]; what stands behind the last
            row is not looked at.
        calibration: sinks and their share.
        padding: [B, K] True for real keys; a row is real if the key at its own position is.
        mask: instead of `padding`, [B or 1, 1, L, K]: True is seen, or numbers to add (the least number hides).
        offset: position of the first row among the keys.
        scale, softcap: of the scores, None takes 1 / sqrt(d); c of c tanh(score / c).
        memory: of the rows before; needed for `offset` above 0.
        rows: of a piece; by default what `PIECE_ELEMENTS` allows.

    Returns:
        [B, H, L, e] in the dtype of `value`, and the memory after these rows.
    """
    (batch, heads, length, width), keys = query.shape, key.shape[2]
    wide = torch.promote_types(value.dtype, torch.float32)
    share = max(1, PIECE_ELEMENTS // (batch * heads // key.shape[1] * keys * min(_ROWS, length)))
    if share < key.shape[1] and rows is None:  # fewer heads at a time rather than fewer rows
        options = {"padding": padding, "mask": mask, "offset": offset, "scale": scale, "softcap": softcap}
        return _in_turn(query, key, value, calibration, memory, share, **options)
    sight = Sight(padding, mask, offset, key)
    memory = grown(memory, batch, heads, keys, wide, key.device)
    scale = width**-0.5 if scale is None else scale
    size = rows or min(_MOST_ROWS, max(32, PIECE_ELEMENTS // (batch * heads * keys)))
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    most = batch * heads * min(size, length) * min(keys, offset + length)
    # fresh memory for every piece takes a third more time: 3.2 for 2.1 ms for the scores of 2 x 256 x 4096
    room = None if learns else key.new_empty(2, most, dtype=wide)
    work = Work(query, key.to(wide), value.to(wide), sight, scale, softcap, room)
    edges = [(start, min(start + size, length)) for start in range(0, length, size)]
    outputs, memory = (_causal if calibration.causal else _prompt)(work, calibration, memory, edges)
    return outputs.to(value.dtype), memory._replace(rows=offset + length)


def _in_turn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, calibration: Calibration, memory: Memory | None,
    share: int, **options: Any,
) -> Mixed:  # fmt: skip
    """`calibrated_chunked` of `share` key heads after another."""
    each, parts = query.shape[1] // key.shape[1], []
    for start in range(0, key.shape[1], share):
        groups, own = slice(start, start + share), slice(start * each, (start + share) * each)
        if memory is not None:
            sinks = None if memory.sinks is None else memory.sinks[:, own]
            options["memory"] = memory._replace(sums=memory.sums[:, own], mass=memory.mass[:, own], sinks=sinks)
        parts.append(calibrated_chunked(query[:, own], key[:, groups], value[:, groups], calibration, **options))
    outputs, memories = zip(*parts, strict=True)
    sums, mass = (torch.cat([getattr(one, name) for one in memories], 1) for name in ("sums", "mass"))
    sinks = None if calibration.causal else torch.cat([one.sinks for one in memories], 1)
    return torch.cat(outputs, 1), memories[0]._replace(sums=sums, mass=mass, sinks=sinks)


class Work(NamedTuple):
    """Operands of one call; key and value in the dtype that sums have. `room` holds a piece's scores and weights."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sight: Sight
    scale: float
    softcap: float | None
    room: torch.Tensor | None = None

    def scores(self, start: int, stop: int) -> torch.Tensor:
        """[B, H, m, keys up to the last row], -inf where not seen."""
        end = min(self.key.shape[2], self.sight.offset + stop)
        scores = self.products(start, stop, self.key[:, :, :end], None if self.room is None else self.room[0])
        return self.sight.hide(scores, start, stop)

    def products(self, start: int, stop: int, key: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of the keys given, seen or not."""
        query = self.query[:, :, start:stop].to(key.dtype) * self.scale
        scores = _grouped(query, key.transpose(-1, -2), room)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def weights(self, start: int, stop: int, scores: torch.Tensor | None = None) -> torch.Tensor:
        """A [B, H, m, keys up to the last row]; rows that see nothing are zero."""
        scores = self.scores(start, stop) if scores is None else scores
        out = None if self.room is None else self.room[1, : scores.numel()].view(scores.shape)
        weights = torch.softmax(scores, -1) if out is None else torch.softmax(scores, -1, out=out)
        every = self.sight.mask is None and self.sight.padding is None
        return weights if every else weights.nan_to_num(0.0)

    def sparse(self, normaliser: torch.Tensor, columns: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The columns [B, H, m, u] of A, from the rows' log-sum-exp [B, H, m]."""
        weights = (self.products(start, stop, self.key[:, :, columns]) - normaliser[..., None]).exp()
        return torch.where(self.sight.sees(start, stop, columns)[:, None], weights, 0.0)

    def mixed(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights times values."""
        return _grouped(weights, self.value[:, :, : weights.shape[-1]])


def _grouped(left: torch.Tensor, right: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
    """left [B, H, m, x] @ right [B, G, x, y], each right factor for H / G heads; in `room` if there is one."""
    batch, heads, rows, inner = left.shape
    groups, width = right.shape[1], right.shape[3]
    shape = (batch, groups, heads // groups * rows, width)
    out = None if room is None else room[: batch * heads * rows * width].view(shape)
    return torch.matmul(left.reshape(*shape[:3], inner), right, out=out).view(batch, heads, rows, width)


def _seen(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def grown(memory: Memory | None, batch: int, heads: int, keys: int, dtype: torch.dtype, device: torch.device) -> Memory:
    """The memory with room for all keys, its sums and counts ready to be written."""
    if memory is None:
        zeros = torch.zeros(batch, heads, keys, dtype=dtype, device=device)
        return Memory(zeros, zeros[:, 0].clone(), zeros[..., 0].clone(), zeros[:, 0, 0].clone(), None, 0)
    more, grow = keys - memory.sums.shape[-1], torch.nn.functional.pad
    sinks = None if memory.sinks is None else grow(memory.sinks, (0, more))
    return memory._replace(sums=grow(memory.sums, (0, more)), counts=grow(memory.counts, (0, more)), sinks=sinks)


def _causal(work: Work, calibration: Calibration, memory: Memory, edges: list[tuple[int, int]]) -> Mixed:
    outputs, sums, counts, mass, real = [], memory.sums.clone(), memory.counts.clone(), memory.mass, memory.real
    for start, stop in edges:
        weights = work.weights(start, stop)
        own, end = work.sight.real(start, stop).to(weights.dtype), weights.shape[-1]
        columns, part, total = _suspects(work.sight, weights, own, sums[..., :end], counts, calibration, start)
        gain = None
        if len(columns):
            known = sums[..., columns], counts[:, columns]
            sinks, _, _ = running_sinks(work.sight, part, columns, *known, calibration, start, stop)
            weights, gain, on_sinks = _redistributed(weights, columns, part, sinks, calibration.beta)
            mass = mass + (on_sinks * own[:, None]).sum(-1)
        mixed = work.mixed(weights)
        outputs.append(mixed if gain is None else mixed * gain[..., None])
        sums[..., :end] = total
        counts[:, :end] += _count(work.sight, start, stop, end, counts.dtype)
        real = real + own.sum(-1)
    return torch.cat(outputs, 2), memory._replace(sums=sums, counts=counts, mass=mass, real=real)


def running_sinks(
    sight: Sight, part: torch.Tensor, columns: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor,
    calibration: Calibration, start: int, stop: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Z of every row [B, H, m, u] among some columns of A, and c and n of these columns [.., u] behind the last row.

    `part` are those columns [B, H, m, u] of A, `sums` [B, H, u] and `counts` [B, u] their c and n of the rows before.
    """
    own = sight.real(start, stop).to(part.dtype)
    total = sums[:, :, None] + (part.detach() * own[:, None, :, None]).cumsum(2)
    number = counts[:, None] + sight.counted(start, stop, columns).to(part.dtype).cumsum(1)
    threshold = threshold_of(calibration, sight, start, stop)[:, None, :, None]
    sinks = sinks_of(total, number[:, None], threshold, columns, sight.first()[:, None, None, None], calibration)
    return sinks, total[:, :, -1], number[:, -1]


def _prompt(work: Work, calibration: Calibration, memory: Memory, edges: list[tuple[int, int]]) -> Mixed:
    length = work.query.shape[2]
    if length == 1 and memory.sinks is not None:
        return _decoded(work, calibration, memory)
    outputs, normalisers = [], []
    sums, counts, mass, real = memory.sums.clone(), memory.counts.clone(), memory.mass, memory.real
    for start, stop in edges:
        scores = work.scores(start, stop)
        weights = work.weights(start, stop, scores)
        normalisers.append((scores.amax(-1) - weights.amax(-1).log()).detach())
        own, end = work.sight.real(start, stop).to(weights.dtype), weights.shape[-1]
        sums[..., :end] += (own[:, None, None] @ weights.detach())[:, :, 0]
        counts[:, :end] += _count(work.sight, start, stop, end, counts.dtype)
        real = real + own.sum(-1)
        outputs.append(work.mixed(weights))
    threshold = threshold_of(calibration, work.sight, 0, length).amin(-1)[:, None, None]
    keys = torch.arange(sums.shape[-1], device=sums.device)
    sinks = sinks_of(sums, counts[:, None], threshold, keys, work.sight.first()[:, None, None], calibration)
    columns = sinks.flatten(0, 1).any(0).nonzero()[:, 0]
    for number, (start, stop) in enumerate(edges):
        near = columns[columns < work.sight.offset + stop]
        if len(near):
            part, chosen = work.sparse(normalisers[number], near, start, stop), sinks[:, :, None, near]
            some = outputs[number], part, near, chosen
            outputs[number], on_sinks = corrected(work, *some, calibration.beta, start, stop)
            mass = mass + (on_sinks * work.sight.real(start, stop).to(sums.dtype)[:, None]).sum(-1)
    return torch.cat(outputs, 2), Memory(sums, counts, mass, real, sinks, 0)


def corrected(
    work: Work, output: torch.Tensor, part: torch.Tensor, columns: torch.Tensor, sinks: torch.Tensor, beta: float,
    start: int, stop: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """g O + (beta - g) O_Z and s, from O and the weights `part` of the columns that hold Z.

    Where 1 - s has lost its digits, and O - O_Z with it, the rows are computed anew.
    """
    weights = part * sinks
    on_sinks = weights.sum(-1)
    left = 1 - on_sinks
    if bool((left < _CANCELS).any()):
        whole = work.weights(start, stop)
        whole, gain, on_sinks = _redistributed(whole, columns, whole[..., columns], sinks, beta)
        return work.mixed(whole) * gain[..., None], on_sinks
    gain = (1 - beta + beta * left) / left
    mixed = _grouped(weights, work.value[:, :, columns])
    return gain[..., None] * output + (beta - gain)[..., None] * mixed, on_sinks


def _decoded(work: Work, calibration: Calibration, memory: Memory) -> Mixed:
    assert memory.sinks is not None
    weights = work.weights(0, 1)
    sinks = memory.sinks[..., : weights.shape[-1]]
    columns = sinks.flatten(0, 1).any(0).nonzero()[:, 0]
    chosen = sinks[:, :, None, columns]
    weights, gain, _ = _redistributed(weights, columns, weights[..., columns], chosen, calibration.beta)
    return work.mixed(weights) * gain[..., None], memory


def _redistributed(
    weights: torch.Tensor, columns: torch.Tensor, part: torch.Tensor, sinks: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A' / g, g and s. `part` are the columns of `weights` that hold sinks; no difference of large numbers is taken."""
    on_sinks = (part * sinks).sum(-1)
    left = 1 - on_sinks
    if bool((left < _CANCELS).any()):
        left = weights.index_copy(-1, columns, part * ~sinks).sum(-1)
    none = left < _TOO_LITTLE
    gain = torch.where(none, 1.0, (1 - beta + beta * left) / left.clamp_min(_TOO_LITTLE))
    share = torch.where(none, 1.0, beta / gain)[..., None]
    copy = weights.index_copy if weights.requires_grad else weights.index_copy_
    return copy(-1, columns, torch.where(sinks, share * part, part)), gain, on_sinks


def threshold_of(calibration: Calibration, sight: Sight, start: int, stop: int) -> torch.Tensor:
    """[B or 1, m] of every row."""
    if not calibration.relative:
        return torch.full((1, 1), calibration.tau, device=sight.device)
    return calibration.tau / sight.in_sight(start, stop)


def _suspects(
    sight: Sight, weights: torch.Tensor, own: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor,
    calibration: Calibration, start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Columns that may be sinks in some row, never too few; those of A; and c [B, H, keys] behind the last row.

    c behind the last row is held against what the rows before the first ask for; of many columns, every few rows'.
    """
    rows, end = weights.shape[-2:]
    total = sums + (own[:, None, None] @ weights.detach())[:, :, 0]
    threshold, least = threshold_of(calibration, sight, start, start + rows).amin(), max(calibration.min_queries, 1)
    passed = total > (threshold * counts[:, :end].clamp_min(least))[:, None]
    columns = passed.flatten(0, 1).any(0).nonzero()[:, 0]
    part = weights[..., columns]
    if len(columns) <= _FEW:
        return columns, part, total
    numbers = torch.arange(rows, device=weights.device)
    member = (numbers // _FEW == numbers[::_FEW, None] // _FEW).to(weights.dtype)
    reached = sums[:, :, None, columns] + ((member * own[:, None])[:, None] @ part.detach()).cumsum(2)
    seen = member @ sight.counted(start, start + rows, columns).to(weights.dtype)
    before = counts[:, None, columns] + seen.cumsum(1) - seen
    passed = (reached > (threshold * before.clamp_min(least))[:, None]).flatten(0, 2).any(0)
    return columns[passed], part[..., passed], total


def sinks_of(
    sums: torch.Tensor, counts: torch.Tensor, threshold: torch.Tensor, keys: torch.Tensor, first: torch.Tensor,
    calibration: Calibration,
) -> torch.Tensor:  # fmt: skip
    """Z, broadcast, from c and n, the threshold, the keys' numbers and the first real key."""
    found = (sums > threshold * counts) & (counts >= calibration.min_queries)
    return found & (keys != first) if calibration.spare_first else found


def _count(sight: Sight, start: int, stop: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, keys] how many real rows of a piece see each key."""
    columns = torch.arange(end, device=sight.device)
    if sight.mask is None and sight.padding is None:
        return (sight.offset + stop - columns).clamp(0, stop - start).to(dtype)[None]
    return sight.counted(start, stop, columns).sum(1).to(dtype)
