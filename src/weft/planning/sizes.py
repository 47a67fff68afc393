"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from weft.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "K": 10**3, "M": 10**6, "G": 10**9,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def size_of(text: str) -> int:
    """The bytes of a size such as ``8GB``, ``7.5GiB`` or ``24G``.

    Raises:
        UserError: It is none.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise UserError(f"{text!r} is no size of memory; write it as 8GB or 7.5GiB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])
