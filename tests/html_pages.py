"""HTML pages read with the standard library: elements, texts, and what a well-made page without scripts must hold."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

_VOID = {"meta", "link", "img", "br", "input", "hr"}
_LOADING = ("src", "href", "srcset", "data", "action", "poster", "xlink:href")


@dataclass(frozen=True)
class Element:
    """A start tag, with the text that is directly in it."""

    tag: str
    attributes: dict[str, str]
    text: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """A parsed page; an end tag that closes nothing, or the wrong element, is an assertion."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.source = text
        self._open: list[Element] = []
        self._pieces: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1].text.append(data)
            self._pieces += [data] * (self._open[-1].tag != "style")

    def all(self, tag: str) -> list[Element]:
        """Elements of one kind."""
        return [element for element in self.elements if element.tag == tag]

    @property
    def text(self) -> str:
        """Every text, whitespace joined."""
        return " ".join(" ".join(self._pieces).split())


def check_page(text: str) -> Page:
    """Everything that holds of each of our pages; gives the page."""
    page = Page(text)
    _check_that_it_is_inert(page)
    _check_references(page)
    _check_structure(page)
    return page


def _check_that_it_is_inert(page: Page) -> None:
    tags = {element.tag for element in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base", "video", "audio"}
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on") or name == "style"], element
        for name in _LOADING:
            value = element.attributes.get(name, "#")
            assert value.startswith(("#", "data:image/")) or value == "data:,", element
    (css,) = re.findall("<style>(.*?)</style>", page.source, re.DOTALL)
    assert "@import" not in css
    assert "url(" not in css
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    (policy,) = [meta.attributes["content"] for meta in page.all("meta")
                 if meta.attributes.get("http-equiv") == "Content-Security-Policy"]  # fmt: skip
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:;")


def _check_references(page: Page) -> None:
    ids = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        named = element.attributes.get("aria-labelledby")
        assert named is None or named in ids, element
        if element.tag == "a":
            assert element.attributes["href"].removeprefix("#") in ids, element


def _check_structure(page: Page) -> None:
    for landmark in ("header", "nav", "main", "footer", "h1", "title"):
        assert page.all(landmark), landmark
    assert len(page.all("h1")) == len(page.all("main")) == 1
    levels = [int(element.tag[1]) for element in page.elements if re.fullmatch("h[1-6]", element.tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(element.attributes.get("alt") for element in page.all("img"))
    assert all("scope" in element.attributes for element in page.all("th"))
    for element in page.elements:
        if element.tag == "svg":
            named = element.attributes.get("role") == "img" and "aria-labelledby" in element.attributes
            assert named or element.attributes.get("aria-hidden") == "true"
        if "scroll" in element.attributes.get("class", "").split():
            assert element.attributes["tabindex"] == "0"
            assert element.attributes["aria-label"]
