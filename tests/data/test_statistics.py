"""Figures of a data set, beside sums done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.data.planted import DataSet, chinese_rows, clean_rows

from weft.data.auditing.audit import audit
from weft.data.auditing.scripts import languages
from weft.data.auditing.statistics import statistics


@pytest.mark.parametrize(
    ("text", "language"),
    [("The sky is blue.", "Latin"), ("天空是蓝色的。", "Chinese"), ("空は青いです。", "Japanese"),
     ("하늘은 파랗다", "Korean"),
     ("Небо голубое", "Cyrillic"), ("السماء زرقاء", "Arabic"), ("ท้องฟ้าสีฟ้า", "Thai"), ("आसमान नीला है", "Devanagari"),
     ("השמיים כחולים", "Hebrew"), ("Ο ουρανός είναι μπλε", "Greek"), ("1 + 2 = 3", "none"), ("", "none"),
     ("def f(x):\n    return x", "code"), ("用 Python 写：\n```python\nprint(1)\n```", "code"),
     ("我用 GPT-4 和 LoRA 训练模型", "Chinese"), ("Das ist schön, très bien, ža", "Latin"), ("\ud800 a", "Latin")],
)  # fmt: skip
def test_languages(text: str, language: str) -> None:
    assert languages(["before", text, "好"]) == ["Latin", language, "Chinese"]


def test_figures(tmp_path: Path) -> None:
    rows = [*clean_rows(20), *chinese_rows(10), clean_rows(1)[0]]
    items, facts = DataSet(rows=rows, options={"max_length": 120, "truncate": True}).items(tmp_path)
    figures = statistics(items, findings=audit(items, facts))
    usable = [item for item in items if item.samples]
    lengths = sorted(item.length for item in usable)
    learned = sum(sum(map(bool, item.samples[0].weights)) for item in usable)
    total = sum(len(item.samples[0].input_ids) for item in usable)
    assert figures["records"] == 31
    assert figures["unusable"] == 31 - len(usable)
    assert figures["lengths"]["min"] == lengths[0]
    assert figures["lengths"]["max"] == lengths[-1]
    assert figures["lengths"]["median"] == lengths[(len(lengths) - 1) // 2]
    assert sum(bar["count"] for bar in figures["histogram"]) == len(usable)
    for bar in figures["histogram"]:
        assert bar["count"] == sum(bar["from"] <= length <= bar["to"] for length in lengths)
    assert (figures["tokens"], figures["learned_tokens"]) == (total, learned)
    assert figures["learned_share"] == pytest.approx(learned / total, abs=1e-4)
    assert figures["truncated"] == sum(length > 120 for length in lengths) > 0
    assert figures["duplicates"] == 1
    assert figures["languages"] == {"Latin": 21, "Chinese": 10}
    (source,) = figures["sources"].values()
    assert source == {"records": 31, "tokens": total, "learned_tokens": learned}


def test_nothing_usable(tmp_path: Path) -> None:
    items, _ = DataSet(rows=[{"instruction": "x", "output": ""}]).items(tmp_path)
    figures = statistics(items)
    assert (figures["records"], figures["usable"], figures["tokens"], figures["histogram"]) == (1, 0, 0, [])
