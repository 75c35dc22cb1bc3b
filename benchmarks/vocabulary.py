"""New vocabularies: merge learner, matching pursuit, search for a token, and a whole rewrite beside tokensurgeon.

Usage: python benchmarks/vocabulary.py [--small] [--rounds 3] [--keep DIR] [--write docs/benchmarks.md]

The corpus is the source of Python's standard library. The learner is measured beside recounting every pair after every
merge, whose first merges are timed and the rest reckoned from them; matching pursuit beside a loop with a least-squares
fit per round; the search for the likeliest of many tokens beside the product with all of them. The rewrite gives a
synthetic llama of 3.5 GB the same new tokens by mergekit-tokensurgeon too, which tries no model: so neither do we.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from document import machine, write_section
from side_by_side import PREFAULT_BYTES, VOCAB, Job, make_base, measure

from regraft.plugins.tokenizer_retrofit.large.index import build_index, default_lists, likeliest
from regraft.plugins.tokenizer_retrofit.large.index import measure as recalls
from regraft.plugins.tokenizer_retrofit.merges import Merge, Word, learn_merges, merged
from regraft.plugins.tokenizer_retrofit.omp import pursue
from regraft.plugins.tokenizer_retrofit.portable.searching import CandidateHead, Index, Rows

MERGES, MEGABYTES = 2048, 5
RECOUNTED = 12
SEARCHED = (
    "The next token among very many, one thread, fp32, rows of 576 numbers in groups, states near rows: every row "
    "multiplied, and an index in int8 with exact logits of 64 candidates:"
)


def corpus(megabytes: float) -> str:
    """Source files in order of their names, as much as asked for."""
    text = []
    left = int(megabytes * 1e6)
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        text.append(path.read_text(errors="replace")[:left])
        left -= len(text[-1])
        if left <= 0:
            break
    return "".join(text)


def words_of(text: str) -> Counter[Word]:
    """Words, blanks and signs, as characters."""
    return Counter(tuple(word) for word in re.findall(r" ?\w+| ?[^\w\s]+|\s+", text))


def recount(words: Counter[Word], size: int) -> list[Merge]:
    """Every pair counted anew for every merge."""
    found: list[Merge] = []
    held = dict(words)
    while len(found) < size:
        counts: Counter[tuple[str, str]] = Counter()
        for word, count in held.items():
            for pair in pairwise(word):
                counts[pair] += count
        pair = min(counts, key=lambda one: (-counts[one], one[0] + one[1], one))
        found.append(Merge(*pair, "".join(pair), counts[pair]))
        rewritten: Counter[Word] = Counter()
        for word, count in held.items():
            rewritten[tuple(merged(word, pair, "".join(pair)))] += count
        held = dict(rewritten)
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what came out."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def learner(small: bool) -> list[str]:
    """Seconds of the learner over corpora of growing size, and of recounting."""
    lines = [
        f"| corpus | merges | learner CPU s | recounting CPU s (from {RECOUNTED} merges) | ratio |",
        "|---|---|---|---|---|",
    ]
    for megabytes in (0.5,) if small else (MEGABYTES / 4, MEGABYTES / 2, MEGABYTES):
        words = words_of(corpus(megabytes))
        spent, merges = timed(lambda words=words: learn_merges(words, MERGES, min_count=3))
        partly, first = timed(lambda words=words: recount(words, RECOUNTED))
        assert first == merges[:RECOUNTED]
        whole = partly / RECOUNTED * len(merges)
        corpus_name = f"{megabytes:g} MB, {len(words)} words"
        lines.append(f"| {corpus_name} | {len(merges)} | {spent:.2f} | {whole:.0f} | {whole / spent:.0f} |")
        print(lines[-1], flush=True)
    return lines


def plain_pursuit(atoms: torch.Tensor, target: torch.Tensor, k: int) -> tuple[list[int], torch.Tensor]:
    """One target after the other, a least-squares fit per round."""
    chosen: list[int] = []
    left, norms = target, atoms.norm(dim=1)
    for _ in range(k):
        scores = (atoms @ left).abs() / norms
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        fit = torch.linalg.lstsq(atoms[chosen].T, target[:, None]).solution[:, 0]
        left = target - atoms[chosen].T @ fit
    return chosen, fit


def pursuit(small: bool) -> list[str]:
    """Targets per second of both forms."""
    count, width, targets, k = (500, 64, 32, 8) if small else (8000, 576, 512, 64)
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(count, width, generator=generator, dtype=torch.float64)
    wanted = torch.randn(targets, width, generator=generator, dtype=torch.float64)
    batched, (chosen, _) = timed(lambda: pursue(atoms, wanted, k))
    few = min(targets, 32)
    looped, plain = timed(lambda: [plain_pursuit(atoms, target, k)[0] for target in wanted[:few]])
    assert chosen[:few].tolist() == plain
    one, other = batched / targets * 1000, looped / few * 1000
    sizes = f"Matching pursuit, {count} atoms of {width} numbers, {k} for each target, float64"
    return [
        f"{sizes}: {one:.1f} CPU ms a target in batches, {other:.1f} in a loop, the same atoms: {other / one:.1f} x."
    ]


def searched(small: bool) -> list[str]:
    """CPU ms for the logits of one token: every row multiplied, and an index with exact logits of candidates."""
    lines = [
        "| rows | exact, CPU ms | index built, CPU s | lists | searched | likeliest found | CPU ms | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return lines + (searched_rows(2_000, 64, 16, 64) if small else searched_rows(100_000, 576, 64, 256))


def searched_rows(count: int, width: int, candidates: int, queries: int) -> list[str]:
    """A line for each number of lists that are searched."""
    rows, ids, lists = clustered(count, width), torch.arange(count), default_lists(count)
    generator = torch.Generator().manual_seed(1)
    states = rows[torch.randperm(count, generator=generator)[:queries]]
    states = states + rows.std() / 2 * torch.randn(states.shape, generator=generator)

    def vectors() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(torch.split(ids, 4096), torch.split(rows, 4096), strict=True)

    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index.faiss"
        given = {"total": count, "width": width, "lists": lists, "storage": "int8", "seed": 0, "file": file}
        built, _ = timed(lambda: build_index(vectors, **given))
        wanted = likeliest(vectors, states)
        whole = token_milliseconds(lambda state: (state @ rows.T).argmax(), states)
        for recall in recalls(file, states, wanted, candidates):
            index = Index(file, recall.probes)
            head = CandidateHead(Rows(rows[:8], rows[8:]), None, ids[:1], index, ids, candidates)
            spent = token_milliseconds(lambda state, head=head: head(state[None]).argmax(), states)
            found = f"{recall.probes} | {100 * recall.first:.1f}% | {spent:.2f} | {whole / spent:.1f}"
            lines.append(f"| {count} | {whole:.1f} | {built:.1f} | {lists} | {found} |")
            print(lines[-1], flush=True)
    return lines


def clustered(count: int, width: int) -> torch.Tensor:
    """Rows in groups, with a part that all share, as rows of a vocabulary have it."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(max(1, count // 50), width, generator=generator)
    own = torch.randn(count, width, generator=generator)
    return torch.randn(width, generator=generator) + groups[torch.arange(count) % len(groups)] + own


def token_milliseconds(work: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> float:
    """Median CPU time of one call, a state at a time."""
    spent = []
    for state in states[:64].split(1):
        started = time.process_time()
        work(state)
        spent.append(time.process_time() - started)
    return 1000 * sorted(spent)[len(spent) // 2]


def make_tokenizer(folder: Path, text: str) -> None:
    """A byte-level BPE that fills most of the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([text], trainer)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<unk>"}))


def rewrites(root: Path, rounds: int, small: bool) -> list[str]:
    """Wall, CPU and memory of `extend`, of the donor's vocabulary, and of tokensurgeon on the same work."""
    base, out = root / "base", root / "out"
    if not base.exists():
        # In a process of its own: the peak memory of a command is never below that of who starts it.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            apart.submit(make_base, base, 2 if small else 24).result()
            apart.submit(make_tokenizer, base, corpus(4)).result()
        (root / "corpus.txt").write_text(corpus(8)[-2_000_000:])
    step = '[base]\nmodel = "base"\n[[steps]]\nuse = "tokenizer-retrofit"\nproof = "files"\n'
    (root / "extend.toml").write_text(f'{step}corpus = "corpus.txt"\nsize = {MERGES}\nmin_count = 2\n')
    (root / "donor.toml").write_text(f'{step}vocabulary = "replace-donor"\ndonor = "donor"\n')
    regraft = [sys.executable, "-m", "regraft", "apply", "--no-durable"]
    if not (root / "donor").exists():
        made = Job("donor", "donor", [*regraft, str(root / "extend.toml"), "-o", str(root / "donor")])
        measure(made, out, 1 << 20)
    surgeon = str(Path(sys.executable).with_name("mergekit-tokensurgeon"))
    table = [
        Job("regraft extend, learning included", "new tokens", [*regraft, str(root / "extend.toml"), "-o", str(out)]),
        Job("regraft replace-donor", "new tokens", [*regraft, str(root / "donor.toml"), "-o", str(out)]),
    ]
    if not small:
        table.append(Job("mergekit-tokensurgeon, subword", "new tokens",
                         [surgeon, str(base), str(root / "donor"), str(out), "-a", "subword"]))  # fmt: skip
    samples = {job: [] for job in table}
    for _ in range(rounds):
        for job in table:
            samples[job].append(measure(job, out, PREFAULT_BYTES // (10 if small else 1)))
            print(f"{job.name}: {samples[job][-1].wall:.1f} s", flush=True)
    lines = ["| tool | wall s | CPU s | peak RSS MB |", "|---|---|---|---|"]
    for job in table:
        middle = sorted(samples[job], key=lambda sample: sample.wall)[len(samples[job]) // 2]
        lines.append(f"| {job.name} | {middle.wall:.1f} | {middle.cpu:.1f} | {middle.rss / 1e6:.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="try it out, without peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    parser.add_argument("--write", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        root = (options.keep or Path(scratch)).resolve()
        root.mkdir(exist_ok=True)
        size = "0.4" if options.small else "3.5"
        rounds = f"medians of {options.rounds} rounds in turn"
        lines = [machine("torch", "tokenizers", "mergekit"), ""]
        given = f'given {MERGES} tokens, {rounds}; proof = "files", since the peer tries no model either'
        lines += [f"A synthetic llama, bf16, {size} GB, {given}:", ""]
        lines += [*rewrites(root, options.rounds, options.small), "", "The merge learner on Python sources:", ""]
        lines += [*learner(options.small), "", *pursuit(options.small), "", SEARCHED, "", *searched(options.small)]
    write_section(options.write, "Vocabularies", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
