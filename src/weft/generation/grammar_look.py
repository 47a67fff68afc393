"""Builds a grammar in a process of its own, which can be ended: a few schemas take llguidance hours and all memory.

``constraint.py`` runs this file by its path, so that the process loads llguidance and nothing else. It reads a grammar
from its standard input, and writes what is wrong with it: nothing, if all is well.
"""

from __future__ import annotations

import sys

import llguidance

_MEMORY = 4 << 30  # bytes of addresses


class Bytes:
    """The least tokenizer: a token for every byte, and an end."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def fault_of(grammar: str) -> str:
    """What llguidance says against a grammar, at its beginning."""
    limits = llguidance.LLParserLimits(verbose_errors=False)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    matcher = llguidance.LLMatcher(tokenizer, grammar, limits=limits, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error()


def main() -> None:
    """Read, build, tell."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    except (ImportError, ValueError, OSError):  # not on this system, or there is a lower limit already
        pass
    sys.stdout.buffer.write(fault_of(sys.stdin.buffer.read().decode()).encode())


if __name__ == "__main__":
    main()
