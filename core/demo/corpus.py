"""What `demo:tiny` learns from: verses, and exercises in copying and recall that are built from them.

Everything here is text. A document is `<|begin|>...<|end|>`; a chat is what the checkpoint's chat template renders.
The facts of the exercises are invented anew each time, so what the model says about them it has read in its context.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from random import Random

from regraft.core.errors import InputError

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (BEGIN, END, PAD, "<|system|>", "<|user|>", "<|assistant|>")
"""In the order of their ids, from 0."""

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

HELD_OUT_BOOKS = ("Ruth", "Eccl", "Jonah", "Jas")
"""Never trained on, neither by the tokenizer nor by the model."""

_VERSE = re.compile(r"(\d?[A-Z][A-Za-z]+)(\d+):(\d+) (\S.*)")
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b")
_CLAUSE_END = re.compile(r"[,:;] ")


@dataclass(frozen=True, slots=True)
class Verse:
    """One verse, with the abbreviation of its book, such as `1Ki`."""

    book: str
    chapter: int
    text: str


def parse_verses(text: str, where: object) -> list[Verse]:
    """The verses of a text of lines such as `Ge1:1 In the beginning...`; empty lines are skipped.

    Raises:
        InputError: a line is something else, or there is none.
    """
    verses = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = _VERSE.fullmatch(line.rstrip())
        if match:
            verses.append(Verse(match[1], int(match[2]), match[4]))
        elif line.strip():
            raise InputError(
                "this line is no verse",
                where=f"{where}:{number}",
                expected="Book1:2 and the text of the verse",
                found=repr(line[:40]),
                remedy="give the output of `bible -f gen1:1-rev22:21`, of the Debian package bible-kjv",
            )
    if not verses:
        raise InputError("the file has no verses", where=where, remedy="give the output of `bible -f gen1:1-rev22:21`")
    return verses


def split(verses: Sequence[Verse]) -> tuple[list[Verse], list[Verse]]:
    """The verses to train on, and those of the held-out books."""
    train = [verse for verse in verses if verse.book not in HELD_OUT_BOOKS]
    return train, [verse for verse in verses if verse.book in HELD_OUT_BOOKS]


def chapters(verses: Sequence[Verse]) -> list[str]:
    """The text of each chapter, a verse a line."""
    groups = groupby(verses, key=lambda verse: (verse.book, verse.chapter))
    return ["\n".join(verse.text for verse in group) for _, group in groups]


def names_in(verses: Sequence[Verse], at_least: int = 10) -> list[str]:
    """Proper names that occur `at_least` times inside a sentence and never in lower case, in alphabetical order."""
    text = "\n".join(verse.text for verse in verses)
    words = set(re.findall(r"[a-z]+", text))
    counts = Counter(_NAME.findall(text))
    return sorted(name for name, count in counts.items() if count >= at_least and name.lower() not in words)


def document(text: str) -> str:
    """A text between the tokens that begin and end a document."""
    return f"{BEGIN}{text}{END}"


def chat(*turns: tuple[str, str]) -> str:
    """Turns of (role, content), as `CHAT_TEMPLATE` renders them."""
    return BEGIN + "".join(f"<|{role}|>{content}{END}" for role, content in turns)


@dataclass(frozen=True)
class Exercises:
    """Documents whose last part can be told from their first.

    Args:
        verses: the texts they are built from.
        names: the names of the facts; at least eight.
        most_words: the longest list of words to repeat.
        room: the most characters of other text among the facts; with 450 nearly all exercises fit in 256 tokens.
    """

    verses: Sequence[str]
    names: Sequence[str]
    most_words: int = 30
    room: int = 450

    @cached_property
    def words(self) -> list[str]:
        """The different words of the verses, rare ones as likely to be drawn as common ones."""
        return sorted({word for verse in self.verses for word in re.findall("[A-Za-z]+", verse)})

    def draw(self, random: Random) -> str:
        """One exercise: words or a verse to repeat, half a verse to continue, or facts to recall."""
        kind = random.random()
        if kind < 0.4:
            return self._repeat(self._words(random))
        if kind < 0.8:
            return self._recall(random, as_chat=kind < 0.6)
        verse = random.choice(self.verses)
        return self._repeat(verse) if kind < 0.9 else self._continue(verse)

    def passage(self, random: Random) -> tuple[str, list[tuple[str, str]]]:
        """Verses with one to four facts among them, and the facts: pairs of a name and what that one was called."""
        count = random.randint(1, 4)
        names = random.sample(self.names, 2 * count)
        facts = list(zip(names[:count], names[count:], strict=True))
        lines = [fact(name, other) for name, other in facts]
        room = self.room * random.random() ** 2
        while len(verse := random.choice(self.verses)) <= room:
            lines.append(verse)
            room -= len(verse)
        random.shuffle(lines)
        return "\n".join(lines), facts

    def _words(self, random: Random) -> str:
        """Names, numbers and other words that nothing but their first reading foretells."""
        return " ".join(self._word(random) for _ in range(random.randint(3, self.most_words)))

    def _word(self, random: Random) -> str:
        kind = random.random()
        if kind < 0.3:
            return random.choice(self.names)
        if kind < 0.5:
            return str(random.randrange(10_000))
        return random.choice(self.words)

    def _repeat(self, text: str) -> str:
        return chat(("user", f"Repeat: {text}"), ("assistant", text))

    def _continue(self, verse: str) -> str:
        ends = [match.end() for match in _CLAUSE_END.finditer(verse)] or [verse.find(" ") + 1]
        middle = min(ends, key=lambda end: abs(end - len(verse) / 2))
        return chat(("user", f"Continue: {verse[:middle].rstrip()}"), ("assistant", verse[middle:]))

    def _recall(self, random: Random, as_chat: bool) -> str:
        passage, facts = self.passage(random)
        random.shuffle(facts)
        if not as_chat:
            return document("\n".join([passage, *(fact(name, other) for name, other in facts)]))
        asked = [(("user", question(name)), ("assistant", fact(name, other))) for name, other in facts]
        turns = [turn for pair in asked for turn in pair]
        if random.random() < 0.5:
            return chat(("system", passage), *turns)
        return chat(("user", f"{passage}\n{turns[0][1]}"), *turns[1:])


def fact(name: str, other: str) -> str:
    """The sentence that states a fact, and that recalls it."""
    return f"They called {name} {other}."


def question(name: str) -> str:
    """What a chat asks to hear the fact."""
    return f"What did they call {name}?"
