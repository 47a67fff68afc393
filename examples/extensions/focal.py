"""An objective: the focal loss (Lin et al. 2017), which counts tokens less that the model already knows.

The loss of a token with the probability p is ``-(1 - p)^gamma log p``; with gamma = 0 it is the likelihood.

    weft train --extension focal.py run.yaml objective=focal objective_settings.gamma=1
"""

from __future__ import annotations

from torch import Tensor

import weft
from weft.objectives import Supervised


@weft.register_objective("focal")
def focal(logits: Tensor, batch: Supervised, *, gamma: float = 2.0) -> Tensor:
    """The loss of each sequence [num_sequences], from logits [S, vocabulary] at the S learned tokens."""
    log_p = logits.float().log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    return batch.per_sequence(-((1 - log_p.exp()) ** gamma) * log_p)
