"""The text of HTML pages: what a browser would show, paragraph by paragraph. Nothing is fetched and nothing is run.

The parser of the standard library takes time with the square of a malformed page's length (hours for a megabyte of
``<a``), so tags are found here by plain searches. After the first one that fails nothing is sought in that way again.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator

from weft.data.problems import Problem
from weft.data.reading.lines import Lines
from weft.data.reading.rows import Record, RowError
from weft.data.reading.texts import TextUnit, read_texts

PAGE_LIMIT = 32 << 20  # characters
_TAG = re.compile(r"""</?([A-Za-z][^\s/>]*+)(?:[^>"']++|"[^"]*+"|'[^']*+')*+>""")
_NAME = re.compile(r"</?([A-Za-z][^\s/>]*+)")
_HIDDEN = ("script", "style", "template", "noscript", "head", "svg", "math", "select", "textarea")
_ENDS = {name: re.compile(f"</{name}", re.IGNORECASE) for name in _HIDDEN}
_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "body", "dd", "details", "div", "dl", "dt", "fieldset", "figcaption",
    "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "main", "nav", "ol", "p", "pre",
    "section", "summary", "table", "ul",
))  # fmt: skip
_LINES = frozenset(("br", "li", "tr", "caption"))
_CELLS = frozenset(("td", "th"))
_SPACE = re.compile(r"[ \t\r\n\f]+")
_MANY = re.compile(r"\n(?:[ \t]*+\n)++")
_NUMBER = re.compile(r"&#x?[0-9a-f]{9,}+;?", re.IGNORECASE)  # of no character; as a number it would take long


def read_page(lines: Lines, unit: TextUnit) -> Iterator[Record | Problem]:
    """The texts of one page; its lines are counted in the text that is left."""
    source: list[str] = []
    size = 0
    for line in lines:
        size += len(line.text)
        fault = line.text_fault()
        if fault is None and size > PAGE_LIMIT:
            fault = RowError("too_long", f"the page is longer than {PAGE_LIMIT} characters, which is the limit.")
        if fault is not None:
            yield lines.problem(line.number, fault)
            return
        source.append(line.text)
    yield from texts_of(text_of("".join(source)), lines.path, lines.limit, unit)


def texts_of(text: str, path: str, limit: int, unit: TextUnit) -> Iterator[Record | Problem]:
    """The records of a text that was taken out of a document."""
    data = text.replace("\0", "").encode("utf-8", "replace")
    yield from read_texts(Lines(io.BytesIO(data), path, limit), unit)


def text_of(page: str) -> str:
    """The text of a page. Blank lines stand around blocks, tabs between the cells of a table."""
    parts, kept = ["\n"], 0  # kept: how many <pre> elements are open
    for text, tag in _pieces(page):
        if text:
            text = html.unescape(_NUMBER.sub("", text)) if "&" in text else text
            if not kept:
                text = _SPACE.sub(" ", text)
                text = text.lstrip(" ") if parts[-1].endswith(("\n", "\t")) else text
            parts.append(text)
        name = tag.removeprefix("/")
        if name == "pre":
            kept = max(kept + (1 if tag == name else -1), 0)
        if name in _BLOCKS:
            parts.append("\n\n")
        elif tag in _LINES:
            parts.append("\n")
        elif tag in _CELLS and not parts[-1].endswith("\n"):
            parts.append("\t")
    lines = "".join(part for part in parts if part).split("\n")
    return _MANY.sub("\n\n", "\n".join(map(str.rstrip, lines))).strip("\n")


def _pieces(page: str) -> Iterator[tuple[str, str]]:
    """Stretches of text, each with the tag behind it (``p``, ``/p``, or nothing). What is not shown is left out."""
    at, whole = 0, True
    while (begin := page.find("<", at)) >= 0:
        text, tag = page[at:begin], ""
        mark = page[begin + 1 : begin + 2]
        if mark in ("!", "?"):
            close = "-->" if page.startswith("<!--", begin) else ">"
            end = page.find(close, begin + 2)
            at = end + len(close) if end >= 0 else len(page)
        elif (found := _NAME.match(page, begin)) is None:
            text, at = page[at : begin + 1], begin + 1
        else:
            match = _TAG.match(page, begin) if whole else None
            whole = match is not None  # a quotation mark is left open
            end = match.end() if match else page.find(">", found.end()) + 1
            at = end or len(page)
            tag = found[1].lower()
            if page[begin + 1] == "/":
                tag = f"/{tag}"
            elif tag in _ENDS:
                closed = _ENDS[tag].search(page, at)
                if closed is not None or tag != "head":  # the end of a head may be left out
                    at = closed.start() if closed else len(page)
        yield text, tag
    yield page[at:], ""
