"""The corpus: hostile files and folders, made by code. ``CASES`` has them in a fixed order."""

from __future__ import annotations

from tests.hostile import code, files, sizes, templates
from tests.hostile.kit import Case

CASES: list[Case] = [*code.CASES, *files.CASES, *sizes.CASES, *templates.CASES]
