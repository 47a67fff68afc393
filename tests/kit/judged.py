"""Records whose answers were judged, and the objectives that learn from them."""

from __future__ import annotations

import random
from typing import Any

from tests.kit.models import VOCABULARY

from weft.data import Sample

# Every objective over judged answers, with all that its settings can add to the loss.
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"sft_weight": 0.3, "label_smoothing": 0.1}),
    "hinge": ("dpo", {"loss_type": "hinge"}),
    "ipo": ("dpo", {"loss_type": "ipo"}),
    "ipo_sum": ("dpo", {"loss_type": "ipo_sum"}),
    "robust": ("dpo", {"loss_type": "robust", "label_smoothing": 0.1}),
    "sigmoid_norm": ("dpo", {"loss_type": "sigmoid_norm"}),
    "apo_zero": ("dpo", {"loss_type": "apo_zero"}),
    "apo_down": ("dpo", {"loss_type": "apo_down"}),
    "sppo_hard": ("dpo", {"loss_type": "sppo_hard"}),
    "nca_pair": ("dpo", {"loss_type": "nca_pair"}),
    "exo_pair": ("dpo", {"loss_type": "exo_pair", "label_smoothing": 0.05}),
    "orpo": ("orpo", {}),
    "simpo": ("simpo", {"sft_weight": 0.2}),
    "kto": ("kto", {"desirable_weight": 1.3}),
    "reward": ("reward", {"center_rewards_coefficient": 0.01}),
    "regression": ("regression", {"mean": 0.2, "scale": 0.5}),
}
# They learn scores, through a head.
SCORED = ("reward", "regression")


def records(count: int, *, answers: int = 2, seed: int = 0, low: int = 2, high: int = 9) -> list[Sample]:
    """Random prompts of ``low`` to ``high`` tokens with so many random answers each; the weights are not all 1.

    With one answer each has a verdict; all have a margin, or score.
    """
    rng = random.Random(seed)
    found = []
    for number in range(count):
        ids = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]
        weights, branches = [0.0] * len(ids), []
        for index in range(answers):
            branches.append(len(ids))
            size = rng.randint(1, high)
            ids += [rng.randrange(3, VOCABULARY), *(rng.randrange(3, VOCABULARY) for _ in range(size - 1)), 2]
            weights += [1.0] * size + [0.5 if index else 1.0]
        facts: dict[str, Any] = {"label": number % 2} if answers == 1 else {}
        facts["given"] = 0.25 * (number % 3)
        place = f"pairs.jsonl:{number + 1}"
        found.append(Sample(ids, weights, place, answer=branches[0], branches=tuple(branches), **facts))
    return found
