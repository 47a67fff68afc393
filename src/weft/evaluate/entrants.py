"""Who takes part in an evaluation: an adapter or the base, and how each is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from weft.core.adapters import Adapters
from weft.errors import UserError
from weft.evaluate.results import Kind
from weft.evaluate.tasks import Exercise, Frame, Task
from weft.files.adapter_folder import stored_tensors
from weft.generation.target import BASE, Target


@dataclass(frozen=True)
class Entrant:
    """One who answers.

    Attributes:
        name: by which its items name it; no two have the same.
        adapter: which adapter answers; None: the base.
        frame: gives what stands around an exercise's question. The task's own is ``Task.frame``; a prompting baseline
            has another.
        facts: what else is known of it (``Contestant.facts``).
    """

    name: str
    adapter: str | None
    kind: Kind = "adapter"
    _: KW_ONLY
    frame: Callable[[Task, Exercise], Frame] = Task.frame
    facts: Mapping[str, object] = field(default_factory=dict)


def entrants_of(target: Target, names: Sequence[str] | None = None) -> list[Entrant]:
    """The base and the adapters of a target, or those that are named.

    Raises:
        UserError: There is no such adapter.
    """
    chosen = [None, *target.names] if names is None else list(dict.fromkeys(target.adapter(name) for name in names))
    if BASE in target.names and None in chosen:
        raise UserError(f"an adapter is called '{BASE}', as the base is in results. Choose others with --adapter.")
    return [
        Entrant(
            BASE if name is None else name, name, "base" if name is None else "adapter", facts=facts_of(target, name)
        )
        for name in chosen
    ]


def facts_of(target: Target, adapter: str | None) -> dict[str, object]:
    """What is known of an adapter (None: the base): its method, its size, and what it is asked with."""
    tokenizer, adapters = target.renderer.tokenizer, target.adapters
    stops = sorted(target.stop_ids) if adapters.architecture.writes else []
    asked = {
        "template": target.renderer.fingerprint()["sha256"],
        "stops": [str(tokenizer.convert_ids_to_tokens(number)) for number in stops],
    }
    return asked if adapter is None else {**_size(adapters, adapter), **asked}


def _size(adapters: Adapters, name: str) -> dict[str, object]:
    adapter = adapters[name]
    tensors = stored_tensors(adapter).values()
    return {
        "method": adapter.config.method,
        "trainable_parameters": adapter.num_trainable(),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
