"""An HTML page read strictly: what a browser would mend, and what a report must not have, is an error here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def find_all(self, tag: str, **attributes: str) -> list[Element]:
        wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
        return [e for e in self.walk() if e.tag == tag and wanted.items() <= e.attributes.items()]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def number(self) -> float | None:
        """The number as written for machines; None where there is none."""
        found = self.find_all("data")
        return float(found[0].attributes["value"] or "nan") if found else None


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            added = self.open[-1].children[-1]
            assert isinstance(added, Element)
            self.open.append(added)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(text: str) -> Element:
    """The root of well-formed HTML."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root], f"never closed: {[e.tag for e in reader.open[1:]]}"
    return reader.root


def read_page(text: str) -> Element:
    """The root of a page that is well-formed, fetches nothing, and can be read aloud; it may have one short script."""
    root = parse(text)
    assert text.startswith("<!DOCTYPE html>")
    assert [html.attributes["lang"] for html in root.find_all("html")] == ["en"]
    assert len(root.find_all("head")[0].find_all("title")) == 1
    assert len(root.find_all("h1")) == len(root.find_all("main")) == 1
    assert root.find_all("meta", name="viewport")
    scripts = root.find_all("script")
    assert len(scripts) <= 1
    for script in scripts:
        assert not script.attributes, "a script of its own, without src"
        forbidden = r"fetch|XMLHttp|import|eval|innerHTML|document\.write|location|cookie|Storage"
        assert not re.search(forbidden, script.text)
    assert not root.find_all("link") + root.find_all("img") + root.find_all("iframe")
    ids = [e.attributes["id"] for e in root.walk() if "id" in e.attributes]
    assert len(ids) == len(set(ids)), "an id is there twice"
    for element in root.walk():
        for name in ("src", "href", "xlink:href", "style"):
            where = element.attributes.get(name) or ""
            assert not re.match(r"(\w+:)?//", where), f"<{element.tag} {name}='{where[:60]}'>"
            if where.startswith("#"):
                assert where[1:] in ids, f"{where} leads nowhere"
    for style in root.find_all("style"):
        assert not re.search(r"url\((?!#)|@import", style.text)
    for drawing in root.find_all("div", role="img"):
        assert drawing.attributes["aria-label"]
        assert len(drawing.find_all("svg")) == 1
    for table in root.find_all("table"):
        (head,) = table.find_all("thead")
        columns = [e for e in head.walk() if e.tag in ("th", "td")]
        assert all(e.tag == "th" and e.attributes["scope"] == "col" for e in columns)
        for row in table.find_all("tbody")[0].find_all("tr"):
            assert len([e for e in row.walk() if e.tag in ("th", "td")]) == len(columns), row.text
    return root
