"""What looks like a secret is found and never shown whole; what only resembles one is left alone."""

from __future__ import annotations

import pytest

from weft.data.auditing.secrets import KINDS, find_secrets, luhn

# Put together here, so that no scanner of repositories takes this file for a leak.
FOUND = [
    ("api_key", "key: " + "sk-" + "aB3dE5gH7jK9mN1pQ3sT5vW7xY9z"),
    ("api_key", "ghp" + "_" + "16C7e42F292c6912E7710c838347Ae178B4a"),
    ("api_key", "AKIA" + "Q3EGR5TNBUJ2WKLM at the console"),
    ("api_key", "hf" + "_" + "QwErTyUiOpAsDfGhJkLzXcVbNmQwErTyUi"),
    (
        "private_key",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bq8xY2kLm0pQrStUvWx\n-----END RSA PRIVATE KEY-----",
    ),
    ("token", "eyJhbGciOiJIUzI1NiIsInR5" + ".eyJzdWIiOiIxMjM0NTY3ODkw." + "dozjgNryP4J3jVmNHl0w5N"),
    ("password", 'password = "tr0ub4dor&3x"'),
    ("password", "密码：Qw3rty9!zx"),
    ("email", "Write to maria.lopez82@gmail.com today."),
    ("chinese_id", "身份证号11010519491231002X。"),
    ("card", "my card 4539 1488 0343 6467, thanks"),
    ("card", "6228480402564890018"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("us_ssn", "SSN: 536-22-8145"),
    ("phone", "我的手机是13812345679，请联系"),
    ("phone", "call (415) 867-5309 now"),
    ("phone", "+44 20 7946 0958"),
]
NOT = [
    "user@example.com",
    "name@company.com",
    "foo@bar",
    "a@b.c",
    "sk-your-api-key-here-please-do",
    "sk-learn",
    "xoxb-your-token-here",
    "password = os.environ['PASSWORD']",
    "password: your_password1",
    "4539 1488 0343 6468",
    "1234567890123456",
    "110105194912310021",
    "DE00 3704 0044 0532 0130 00",
    "555-555-5555",
    "(555) 867-5309",
    "800-123-4567",
    "123-456-7890",
    "3.14159265358979323846",
    "ISBN 978-3-16-148410-0",
    "2023-01-15 12:30:00",
    "1,234,567,890",
    "the result is 13800000000000",
    "4 8 15 16 23 42 4 8 15 16 23 42",
    "git@github.com:org/repo.git",
    "一共1380元，买了12345个",
    "0123456789",
    "1700000000",
]


@pytest.mark.parametrize(("kind", "text"), FOUND)
def test_found_and_masked(kind: str, text: str) -> None:
    found = list(find_secrets(f"Some words before. {text} And after."))
    assert [secret.kind for secret in found] == [kind]
    assert "…" in found[0].masked
    assert len(found[0].masked.split("…")[0]) <= 4


@pytest.mark.parametrize("text", NOT)
def test_left_alone(text: str) -> None:
    assert list(find_secrets(f"Some words before. {text} And after.")) == []


def test_every_kind_has_an_example() -> None:
    assert {kind for kind, _ in FOUND} == set(KINDS)


def test_each_stretch_counts_once() -> None:
    text = "4539148803436467 and maria.lopez82@gmail.com and 4539148803436467"
    assert [secret.kind for secret in find_secrets(text)] == ["email", "card", "card"]


def test_luhn() -> None:
    assert luhn("79927398713")
    assert not any(luhn(f"7992739871{digit}") for digit in "012456789")
