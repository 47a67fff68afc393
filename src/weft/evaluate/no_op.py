"""Whether an adapter changes anything: the largest change of a logit on a few prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.core.adapters import Adapters
from weft.core.stream import Part
from weft.data import Prompt

_LONGEST = 512  # tokens of a prompt that is looked at


@torch.no_grad()
def largest_changes(adapters: Adapters, names: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, float]:
    """Of each adapter the largest |logit - logit of the base| behind some prompts; 0: it changes nothing there.

    Args:
        names: adapters that write text.
        prompts: what is read; all of them by each adapter, in one pass.
    """
    if not names or not prompts:
        return {}
    cut = [_cut(prompt) for prompt in prompts]
    written = [adapters.layout.written(prompt.ids, prompt.ids[-1:]) for prompt in cut]
    who: list[str | None] = [None, *names]
    parts = [
        Part(
            name,
            [sequence for sequence, _ in written],
            answers=[len(prompt.ids) for prompt in cut],
            slots=[prompt.slots for prompt in cut],
            targets=[target for _, target in written],
        )
        for name in who
    ]
    stream, hidden = adapters.run(parts)
    rows = [
        adapters.layout.before(stream, number, len(cut[number % len(cut)].ids), 1)[0]
        for number in range(len(who) * len(cut))
    ]
    states = hidden.index_select(0, torch.tensor(rows, device=hidden.device))
    logits = adapters.logits(states, [(name, len(cut)) for name in who]).float().split(len(cut))
    return {name: float((own - logits[0]).abs().max()) for name, own in zip(names, logits[1:], strict=True)}


def _cut(prompt: Prompt) -> Prompt:
    """The beginning of a long prompt."""
    if len(prompt.ids) <= _LONGEST:
        return prompt
    return Prompt(prompt.ids[:_LONGEST], tuple(slot for slot in prompt.slots if slot <= _LONGEST))
