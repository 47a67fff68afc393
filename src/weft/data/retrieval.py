"""Passages of documents, and the ones that a question asks for: BM25 over words, and over pairs of CJK characters."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.data.formats.detect import to_example
from weft.data.formats.examples import PlainText
from weft.data.pipeline import read_all
from weft.data.reading.records import Record
from weft.errors import UserError

# Han, kana and Hangul syllables are written without spaces between words (Hangul with few).
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\U00020000-\U0003fffd"
_RUN = re.compile(f"[{_CJK}]+|[^\\W_{_CJK}]+(?:[.,'][^\\W_{_CJK}]+)*")
_SENTENCE = re.compile(r"(?<=[.!?。！？；])\s*")


def is_cjk(text: str) -> bool:
    """Whether a text has a character of Chinese, Japanese or Korean."""
    return re.search(f"[{_CJK}]", text) is not None


def terms(text: str) -> list[str]:
    """What of a text is looked for: words in small letters, and of scripts without spaces every pair of characters.

    A single character between others is a term of its own. Pairs need no dictionary and find what words would
    (Nie, Gao, Zhang and Zhou, 2000, "On the use of words and n-grams for Chinese information retrieval").
    """
    found: list[str] = []
    for run in _RUN.findall(unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")):
        if is_cjk(run):
            found += [run[i : i + 2] for i in range(len(run) - 1)] or [run]
        else:
            found.append(run)
    return found


def covered(answer: str, text: str) -> float:
    """The share of an answer's terms that stand in a text, each as often as it does there; of no terms 1.

    This is K-Precision (Adlakha et al., 2024, "Evaluating Correctness and Faithfulness of Instruction-Following Models
    for Question Answering"), with the terms of ``terms``.
    """
    own = Counter(terms(answer))
    if not own:
        return 1.0
    return (own & Counter(terms(text))).total() / own.total()


@dataclass(frozen=True)
class Passage:
    """A part of a document; ``source`` is the file with the number of the passage in it."""

    text: str
    source: str


def read_passages(documents: str | Path, *, length: int = 800) -> list[Passage]:
    """The passages of a document or of all documents in a folder: whole paragraphs, up to ``length`` characters.

    A longer paragraph is cut behind a sentence, and a longer sentence anywhere. Files are those that training reads
    (.txt, .md, .html; .docx and .pdf with ``weft[office]``; .jsonl with ``text``), also of several kinds.

    Raises:
        UserError: ``length`` is less than 1, there is no file, one cannot be read, or none holds any text.
    """
    if length < 1:
        raise UserError(f"length is {length}; a passage has at least one character.")
    place = Path(documents)
    if not place.exists():
        raise UserError(f"there are no documents at {place}.")
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if _is_document(file, place))
    found = []
    for file in files:
        parts = [part for text in read_all(file, _text, text_unit="file") for part in _cut(text, length)]
        found += [Passage(part, f"{file}#{number}") for number, part in enumerate(parts, 1)]
    if not found:
        raise UserError(f"{place} holds no document with text.")
    return found


def _is_document(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _text(record: Record) -> str:
    example = to_example(record)
    if not isinstance(example, PlainText):
        raise UserError(f"{record.source}: expected a document, that is a text; this is a record of another kind.")
    return example.text


def _cut(text: str, length: int) -> list[str]:
    """The passages of a text."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        pieces = [paragraph] if len(paragraph) <= length else _SENTENCE.split(paragraph)
        fresh = True
        for piece in (one[i : i + length].strip() for one in pieces for i in range(0, len(one), length)):
            if not piece:
                continue
            between = "\n\n" if fresh else " " * (not is_cjk(piece))
            if found and len(found[-1]) + len(between) + len(piece) <= length:
                found[-1] += between + piece
            else:
                found.append(piece)
            fresh = False
    return found


class Index:
    """Finds passages by BM25 in Lucene's variant (Robertson and Zaragoza, 2009; Kamphuis et al., 2020), by ``bm25s``.

    Raises:
        UserError: ``bm25s`` is not installed, or no passage has a term.
    """

    def __init__(self, passages: Sequence[Passage], *, k1: float = 1.5, b: float = 0.75) -> None:
        try:
            import bm25s
        except ImportError:
            raise UserError('passages are looked for by a package: pip install "weft[retrieval]".') from None
        corpus = [terms(passage.text) for passage in passages]
        self.passages, self._known = list(passages), {term for one in corpus for term in one}
        if not self._known:
            raise UserError(f"in none of {len(passages)} passages is there a word to look for.")
        self._engine = bm25s.BM25(method="lucene", k1=k1, b=b)
        self._engine.index(corpus, show_progress=False)

    def scores(self, question: str) -> list[float]:
        """The score of each passage [passages]; 0: it has no term of the question."""
        asked = [term for term in terms(question) if term in self._known]
        if not asked:
            return [0.0] * len(self.passages)
        return [float(score) for score in self._engine.get_scores(asked)]

    def search(self, question: str, count: int) -> list[Passage]:
        """The ``count`` best passages, the best first, of equal ones the earlier; those without a term of it never."""
        scores = self.scores(question)
        best = sorted((place for place, score in enumerate(scores) if score > 0), key=lambda place: -scores[place])
        return [self.passages[place] for place in best[:count]]


def without(passages: Iterable[Passage], answer: str, share: float) -> list[Passage]:
    """The passages that do not cover ``share`` of an answer."""
    return [passage for passage in passages if covered(answer, passage.text) < share]
