"""Who may wait for an answer: so many, and no more. The others are told at once to come back."""

from __future__ import annotations

import math
import time

from weft.serve.envelope import ApiError

_LONGEST_WAIT = 60  # seconds that a client is told to wait


class Admission:
    """Counts the answers that are being written or wait, and turns away what is too much.

    Attributes:
        rows: answers that are there now.
        busy_since: when the first of them came, by ``time.monotonic()``.
    """

    def __init__(self, max_rows: int, max_waiting: int) -> None:
        self.max_rows, self.limit = max_rows, max_rows + max_waiting
        self.rows = 0
        self.busy_since = 0.0
        self._usual = 1.0  # seconds that an answer takes, smoothed

    def check(self, rows: int = 1) -> None:
        """Refuse more answers than there is room for.

        Raises:
            ApiError: There are too many now, or they would be too many at any time.
        """
        if rows > self.limit:
            raise ApiError(
                400,
                f"the request asks for {rows} answers at once; the server has room for {self.limit}.",
                code="too_many",
            )
        if self.rows + rows > self.limit:
            raise ApiError(
                429,
                f"The server is overloaded: {self.rows} answers are being written or wait. Try again later.",
                code="overloaded",
                retry_after=self.wait(),
            )

    def enter(self, rows: int) -> None:
        """Let answers in. Raises as ``check``."""
        self.check(rows)
        if not self.rows:
            self.busy_since = time.monotonic()
        self.rows += rows

    def leave(self, rows: int, seconds: float) -> None:
        """Answers have ended, ``seconds`` after they were let in."""
        self.rows -= rows
        self._usual += 0.1 * (seconds - self._usual)

    def wait(self) -> int:
        """Seconds after which those who wait now should be done."""
        return max(1, min(_LONGEST_WAIT, math.ceil(self._usual * self.rows / self.max_rows)))
