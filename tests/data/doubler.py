"""Work for processes: light to import, and dies on demand."""

from __future__ import annotations

import os
from collections.abc import Sequence

from weft.errors import UserError


class Doubler:
    """Doubles numbers; -1 ends the process, -2 is refused."""

    def make(self, items: Sequence[int]) -> list[int]:
        if -1 in items:
            os._exit(1)
        if -2 in items:
            raise UserError("a setting is wrong")
        return [2 * item for item in items]
