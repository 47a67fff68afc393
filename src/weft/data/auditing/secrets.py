"""Secrets of persons and services in a text: keys, e-mail addresses, phone, identity and card numbers.

A model learns by heart what it sees often enough, so secrets do not belong into training data. None is ever shown
whole. Numbers count only if their check digit is right, or if the words around them say what they are. The examples of
documentation (user@example.com, 555-0100) do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Secret:
    """One find: its ``kind`` (a key of KINDS), and the text ``masked`` so that it can be shown."""

    kind: str
    masked: str


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of secret. No text without ``hint`` matches the pattern, and a hint is quick to look for ("": none)."""

    what: str
    hint: str
    pattern: re.Pattern[str]
    holds: Callable[[str], bool] = bool


def find_secrets(text: str) -> Iterator[Secret]:
    """The secrets in ``text``, kind by kind. No stretch of text is found twice."""
    taken: list[tuple[int, int]] = []
    digits = bool(_DIGITS.search(text))
    for name, kind in KINDS.items():
        if (kind.hint and kind.hint not in text) or (name in _NUMBERS and not digits):
            continue
        for found in kind.pattern.finditer(text):
            start, end = found.span()
            if kind.holds(found[0]) and not any(start < other and begin < end for begin, other in taken):
                taken.append((start, end))
                yield Secret(name, mask(found[0]))


def mask(text: str) -> str:
    """The first characters, and the length."""
    shown = text[: 4 if len(text) > 12 else 2].replace("\n", " ")
    return f"{shown}… ({len(text)} characters)"


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (bank cards)."""
    numbers = [int(digit) for digit in reversed(digits)]
    return (sum(numbers[::2]) + sum(sum(divmod(2 * number, 10)) for number in numbers[1::2])) % 10 == 0


def _card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    # Visa, Mastercard, American Express, Discover, UnionPay. The test numbers of issuers repeat digits.
    issued = re.match(r"4|5[1-5]|2[2-7]|3[47]|6(?:011|5|2)", digits)
    return 13 <= len(digits) <= 19 and bool(issued) and len(set(digits)) > 3 and luhn(digits)


def _chinese_id(text: str) -> bool:
    """GB 11643: region, date of birth, order, check digit modulo 11."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(weight * int(digit) for weight, digit in zip(weights, text, strict=False))
    return "10X98765432"[total % 11] == text[17].upper()


def _iban(text: str) -> bool:
    compact = text.replace(" ", "")
    moved = compact[4:] + compact[:4]
    return len(compact) >= 15 and int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1


def _email(text: str) -> bool:
    local, _, domain = text.lower().partition("@")
    made_up = re.search(r"\.(example|test|invalid|localhost|domain|email|company|yourdomain|xyz|abc)\.", f".{domain}.")
    return not made_up and local not in _MADE_UP_NAMES


def _phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    runs = "01234567890123456789" + "98765432109876543210"
    return len(set(digits)) > 3 and digits[-7:] not in runs and not re.search(r"(?<!\d)555(?!\d)", text)


def _random_looking(text: str) -> bool:
    """Whether it looks like a key: digits and letters, few repetitions, and no word on what to put there."""
    value = re.split(r"[\s:=\"']+", text.rstrip("\"'"))[-1]
    told = re.search(r"(?i)your|example|xxx|placeholder|changeme|dummy|<|\{", value)
    return not told and len(set(value)) >= min(10, len(value) // 2) and bool(re.search(r"\d", value))


_MADE_UP_NAMES = {"user", "username", "name", "your.name", "yourname", "email", "example", "someone", "john.doe",
                  "johndoe", "jane.doe", "janedoe", "foo", "bar", "test", "info", "noreply", "no-reply", "git",
                  "xxxx", "yyyy"}  # fmt: skip
_DIGITS = re.compile(r"\d[\d .()-]{7,}|[A-Z]{2}\d\d")
_NUMBERS = {"card", "chinese_id", "iban", "us_ssn", "phone"}
KINDS: dict[str, _Kind] = {  # in the order in which they take text
    "private_key": _Kind("a private key", "PRIVATE KEY", re.compile(
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----\s*[A-Za-z0-9+/=:\s-]{20,}")),
    "api_key": _Kind("an API key", "", re.compile(
        r"(?<![A-Za-z0-9_-])(?:sk-(?:proj-|ant-|live-)?[A-Za-z0-9_-]{20,}|[srp]k_live_[A-Za-z0-9]{16,}"
        r"|A(?:KI|SI)A[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{20,}"
        r"|hf_[A-Za-z]{30,}|AIza[A-Za-z0-9_-]{35}|xox[abprs]-[A-Za-z0-9-]{10,}|LTAI[A-Za-z0-9]{12,20})(?![A-Za-z0-9])"),
        lambda text: not re.search(r"(?i)your|xxxx|example", text)),
    "token": _Kind("a signed token (JWT)", "eyJ", re.compile(
        r"(?<![\w-])eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}")),
    "password": _Kind("a password or key in an assignment", "", re.compile(
        r"(?i)(?<![a-z])(?:password|passwd|api[_-]?key|secret[_-]?key|access[_-]?token|密码)[\"']?\s*[:=：]\s*[\"']?"
        r"[!-~]{8,}"), _random_looking),
    "email": _Kind("an e-mail address", "@", re.compile(
        r"(?<![\w.+-])[A-Za-z0-9._%+-]{2,40}@(?:[A-Za-z0-9-]{1,40}\.){1,4}[A-Za-z]{2,12}(?![A-Za-z0-9])"), _email),
    "chinese_id": _Kind("a Chinese identity number", "", re.compile(
        r"(?<![\dA-Za-z])[1-8]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?![\dA-Za-z])"),
        _chinese_id),
    "card": _Kind("a bank card's number", "", re.compile(
        r"(?<![\d.-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|3\d{3}[ -]\d{6}[ -]\d{5})(?![\d.-]?\d)"), _card),
    "iban": _Kind("an account's number (IBAN)", "", re.compile(
        r"(?<![A-Z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Z0-9])"), _iban),
    "us_ssn": _Kind("a US social security number", "-", re.compile(
        r"(?i)(?:ssn|social security)[^\d\n]{0,30}(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?!\d)")),
    "phone": _Kind("a phone number", "", re.compile(
        r"(?<![\d.+-])(?:1[3-9]\d{9}|1[3-9]\d[ -]\d{4}[ -]\d{4}|\+[1-9]\d{0,2}(?:[ .-]?\(?\d{2,4}\)?){3,4}"
        r"|\(\d{3}\) ?\d{3}-\d{4}|[2-9]\d\d-\d{3}-\d{4})(?![\d-])"), _phone),
}  # fmt: skip
