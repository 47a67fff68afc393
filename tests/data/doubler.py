"""Work for processes: light to import, and dies on demand."""

from __future__ import annotations

import os

from weft.errors import UserError


class Doubler:
    """Doubles numbers; -1 ends the process, -2 is refused."""

    def make(self, item: int) -> int:
        if item == -1:
            os._exit(1)
        if item == -2:
            raise UserError("a setting is wrong")
        return 2 * item
