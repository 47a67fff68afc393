"""Learning rates for models of any width."""

from __future__ import annotations

import math


def rate_for(hidden_size: int, large: float, small: float) -> float:
    """The rate for a model of this width: small models want larger steps.

    Args:
        large: The rate at width 2048 and more.
        small: The rate at width 128 and less; in between it goes by the width's logarithm.
    """
    share = min(max(math.log2(2048 / hidden_size) / 4, 0.0), 1.0)
    return float(f"{large ** (1 - share) * small**share:.2g}")
