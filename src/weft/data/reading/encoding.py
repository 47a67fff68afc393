"""Recognise text that is not UTF-8, so that one message can say what it is and how to convert it.

The guess is for the message only: a file is never decoded by it. Each rule asks how the bytes above 0x7F lie, because
the older encodings of a script differ in that.
"""

from __future__ import annotations

import codecs
import re
import shlex
from pathlib import Path

from weft.data.reading.rows import BROKEN
from weft.errors import UserError

_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_FEW = 4  # bytes that are not UTF-8; fewer may be damage in a file of UTF-8
_MOSTLY = 3  # times as many broken bytes as good characters; GBK's pairs are good UTF-8 now and then
_PAIR = re.compile(rb"[\x80-\xff][\x00-\xff]")
_HIGH = re.compile(rb"[\x80-\xff]")
_WHOLE = re.compile(rb"[\x81-\xfe][\x40-\x7e\x80-\xfe]")
_EAST = re.compile("[\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef\t-~]")
_SAMPLE = 1 << 16
_SAID = {"GB18030": "GBK or GB18030"}  # the second holds the first


def check_encoding(path: Path, head: bytes, packed: bool) -> None:
    """Refuse a file whose first bytes (``head``, unpacked) are text in another encoding than UTF-8.

    Raises:
        UserError: It is UTF-16 or UTF-32, or nearly all that is not ASCII is no UTF-8 and fits an older encoding.
    """
    name = next((name for mark, name in _BOMS.items() if head.startswith(mark)), None) or _without_mark(head)
    if name is not None:
        raise UserError(f"{path}: this is text in {name}, and only UTF-8 is read. {_convert(path, name, packed)}")
    if head.isascii():
        return
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head)
    broken = BROKEN.findall(text)
    if len(broken) < _FEW or len(broken) < _MOSTLY * sum(not "\x00" <= one <= "\x7f" for one in BROKEN.sub("", text)):
        return
    if (name := guess(head)) is not None:
        first = BROKEN.search(text)
        assert first is not None
        line = 1 + text.count("\n", 0, first.start())
        raise UserError(
            f"{path}:{line}: the file is not UTF-8, most likely it is {_SAID.get(name, name)}. "
            f"{_convert(path, name, packed)}"
        )


def _convert(path: Path, name: str, packed: bool) -> str:
    """The command that makes a file of UTF-8."""
    if packed:
        return f"Unpack it, and convert it with `iconv -f {name} -t UTF-8`."
    old, new = shlex.quote(str(path)), shlex.quote(str(path.with_name(f"{path.stem}.utf8{path.suffix}")))
    return f"Write `iconv -f {name} -t UTF-8 {old} > {new}`, and name the new file."


def _without_mark(head: bytes) -> str | None:
    """UTF-16 without a byte order mark: ASCII has a zero on one side, and other text reads as Chinese or Japanese."""
    sample = head[: min(len(head), 4096) // 2 * 2]
    sides = sample[1::2].count(0), sample[::2].count(0)
    zeros = max(sides) >= _FEW and max(sides) >= 5 * min(sides) and 20 * max(sides) >= len(sample)
    if not zeros and (_decodes(sample, "UTF-8") or 4 * len(_HIGH.findall(sample)) < len(sample) or guess(sample)):
        return None
    for name, ascii_zeros in zip(("UTF-16LE", "UTF-16BE"), sides, strict=True):
        if (zeros and ascii_zeros < max(sides)) or not _decodes(sample, name):
            continue
        text = sample.decode(name, "ignore")
        good = sum(letter.isprintable() or letter in "\t\r\n" for letter in text)
        if good == len(text) and (zeros or len(_EAST.findall(text)) > 0.9 * len(text) > _FEW):
            return name
    return None


def guess(data: bytes) -> str | None:
    """The likely encoding of bytes that are not UTF-8, under the name that iconv has for it; None if none is likely."""
    sample = data[:_SAMPLE]
    high = _HIGH.findall(sample)
    if not high:
        return None
    pairs = [(pair[0], pair[1]) for pair in _PAIR.findall(sample)]
    leads = [lead for lead, _ in pairs]

    def share(first: int, last: int) -> float:
        return sum(first <= lead <= last for lead in leads) / len(leads)

    # The characters of everyday use lie in these rows; punctuation lies in A1 to A3.
    common = share(0xA1, 0xA3)
    short = sum(trail < 0xA1 for _, trail in pairs) / max(len(pairs), 1)
    rules = (
        ("SHIFT_JIS", bool(leads) and share(0x82, 0x83) > 0.25),
        ("EUC-JP", bool(leads) and short < 0.05 and share(0xA4, 0xA5) > 0.25),
        ("BIG5", bool(leads) and 0.15 < short < 0.9 and common + share(0xA4, 0xC6) > 0.8 and _in_pairs(sample)),
        ("EUC-KR", len(leads) >= 8 and short < 0.05 and common + share(0xB0, 0xC8) > 0.98),
        ("GB18030", bool(leads) and short < 0.15 and common + share(0xB0, 0xD7) > 0.7 and _in_pairs(sample)),
        ("WINDOWS-1251", _runs(sample) > 2.5 and sum(b >= b"\xc0" for b in high) > 0.8 * len(high)),
        ("WINDOWS-1252", _runs(sample) < 2 and sum(b"\x80" <= b <= b"\xfc" for b in high) == len(high)),
    )
    return next((name for name, fits in rules if fits and _decodes(sample, name)), None)


def _in_pairs(sample: bytes) -> bool:
    """Whether words consist of whole pairs, as Chinese text does; Cyrillic words have any length."""
    return not re.search(rb"[\x80-\xff][\x00-\x2f]", _WHOLE.sub(b"", sample))


def _runs(sample: bytes) -> float:
    """The mean length of stretches of bytes above 0x7F: long in Cyrillic, where all letters are such."""
    runs = re.findall(rb"[\x80-\xff]+", sample)
    return sum(map(len, runs)) / len(runs)


def _decodes(sample: bytes, name: str) -> bool:
    try:
        codecs.getincrementaldecoder(name)().decode(sample)
    except UnicodeDecodeError:
        return False
    return True
