"""The models that are served: public names, and the adapters behind them.

An adapter stands in ``Adapters`` under its name and the hash of what it holds. So one that comes under a name that was
there before never meets what was kept of the other, and answers that are being written end with the weights they began
with.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from weft.core.adapter import MethodConfig
from weft.errors import UserError
from weft.files.adapter_folder import add_with_tensors, stored_tensors
from weft.generation.engine import Engine
from weft.generation.target import BASE, Target
from weft.serve.answers import AdapterAnswer, ModelCard
from weft.serve.candidates import Candidate
from weft.serve.envelope import bad_request, no_model
from weft.serve.metrics import Metrics

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Served:
    """A model that is served.

    Attributes:
        name: what clients call it.
        internal: its name in ``Adapters``; None: the base.
        target: how it is asked.
        writes: whether it writes text; else it names one of ``labels``.
    """

    name: str
    internal: str | None
    target: Target
    _: KW_ONLY
    root: str
    created: int
    parent: str | None = None
    sha256: str | None = None
    method: str | None = None
    writes: bool = True
    labels: tuple[str, ...] = ()

    def card(self) -> ModelCard:
        """What ``/v1/models`` says of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "weft",
            "root": self.root,
            "parent": self.parent,
            "max_model_len": self.target.adapters.architecture.max_length,
            "sha256": self.sha256,
            "method": self.method,
            "labels": list(self.labels) or None,
        }


class Registry:
    """Finds models by name, and adds and removes adapters between two steps of the engine."""

    def __init__(self, target: Target, engine: Engine, base_name: str, *, max_adapters: int, metrics: Metrics) -> None:
        self.target, self.engine, self.max_adapters, self.metrics = target, engine, max_adapters, metrics
        self._created = int(time.time())
        adapters = target.adapters
        self.base = Served(
            base_name,
            None,
            target,
            root=base_name,
            created=self._created,
            writes=adapters.architecture.writes,
        )
        self._models = {base_name: self.base}
        for name in target.names:
            if name == base_name:
                raise UserError(
                    f"an adapter and the base are both called '{name}': give the base another name with --model-name."
                )
            adapter = adapters[name]
            known = identity(adapter.config, stored_tensors(adapter), adapter.head.labels, adapter.provenance)
            self._models[name] = self._served(name, name, target, sha256=known, root=name)
        # Adapters with answers that are being written, and those that go when these have ended.
        self._running: dict[str, int] = {}
        self._retired: dict[str, Served] = {}
        self._changing = asyncio.Lock()

    def _served(self, name: str, internal: str, target: Target, *, sha256: str, root: str) -> Served:
        adapter = target.adapters[internal]
        return Served(
            name,
            internal,
            target,
            root=root,
            created=int(time.time()),
            parent=self.base.name,
            sha256=sha256,
            method=adapter.config.method,
            writes=target.adapters.architecture.writes and adapter.head.writes,
            labels=tuple(adapter.head.labels),
        )

    def models(self) -> list[Served]:
        """All that are served; the base comes first."""
        return list(self._models.values())

    def find(self, name: str) -> Served:
        """The model of a name; ``base`` is the base, unless an adapter is called so.

        Raises:
            ApiError: There is none.
        """
        found = self._models.get(name) or (self.base if name == BASE else None)
        if found is None:
            raise no_model(name, list(self._models))
        return found

    def enter(self, served: Served) -> None:
        """An answer of this model begins: it stays until the answer has ended."""
        if served.internal is not None:
            self._running[served.internal] = self._running.get(served.internal, 0) + 1

    async def leave(self, served: Served) -> None:
        """An answer of this model has ended."""
        internal = served.internal
        if internal is None:
            return
        self._running[internal] -= 1
        if not self._running[internal]:
            del self._running[internal]
            if internal in self._retired:
                await self._remove(internal)

    async def load(self, candidate: Candidate, *, in_place: bool) -> AdapterAnswer:
        """Serve an adapter that was read from a folder.

        Raises:
            ApiError: One of its name is served, there are too many, or it does not fit the base.
        """
        async with self._changing:
            name = candidate.name
            known = identity(candidate.config, candidate.tensors, candidate.labels, candidate.provenance)
            old = self._models.get(name)
            if old is self.base:
                raise bad_request(f"'{name}' is the name of the base.", "lora_name", "name_taken")
            if old is not None and old.sha256 == known:
                return {"status": "unchanged", "lora_name": name, "sha256": known}
            if old is not None and not in_place:
                raise bad_request(
                    f"An adapter '{name}' is served already, with other weights. Unload it first, or send "
                    "load_inplace: true.", "lora_name", "name_taken",
                )  # fmt: skip
            if old is None and len(self._models) > self.max_adapters:
                raise bad_request(
                    f"{self.max_adapters} adapters are served, which is the limit. Unload one first.", code="too_many"
                )
            internal = f"{name[:80]}.{known[:16]}"
            await self._add(internal, candidate)
            target = candidate.target(self.target, internal)
            self._models[name] = self._served(name, internal, target, sha256=known, root=candidate.root)
            if old is not None:
                await self._retire(old)
            return {"status": "replaced" if old else "loaded", "lora_name": name, "sha256": known}

    async def _add(self, internal: str, candidate: Candidate) -> None:
        if self._retired.pop(internal, None) is not None:
            return  # answers of the same weights are still being written
        adapters = self.target.adapters

        def add() -> None:
            adapter = add_with_tensors(
                adapters,
                internal,
                candidate.config,
                candidate.tensors,
                tokenizer=candidate.tokenizer,
                head=candidate.classes,
            )
            adapter.record_origin(candidate.provenance, candidate.trained_on)

        try:
            await between_steps(self.engine, add)
        except UserError as error:
            raise bad_request(str(error), "lora_path", "adapter_refused") from None

    async def unload(self, name: str) -> AdapterAnswer:
        """Serve an adapter no more. It is removed when its last answer has ended.

        Raises:
            ApiError: There is none of that name, or it is the base.
        """
        async with self._changing:
            found = self.find(name)
            if found.internal is None:
                raise bad_request("The base cannot be unloaded.", "lora_name", "is_base")
            del self._models[found.name]
            await self._retire(found)
            return {"status": "unloaded", "lora_name": name, "sha256": found.sha256 or ""}

    async def _retire(self, served: Served) -> None:
        assert served.internal is not None
        self._retired[served.internal] = served
        if served.internal not in self._running:
            await self._remove(served.internal)

    async def _remove(self, internal: str) -> None:
        gone = self._retired.pop(internal)
        if gone.name not in self._models:
            self.metrics.forget(gone.name)
        await between_steps(self.engine, lambda: self.target.adapters.remove(internal))


def between_steps(engine: Engine, function: Callable[[], _Result]) -> Awaitable[_Result]:
    """The result of a function that the engine calls between two steps. It is called even if nobody waits any more."""
    return asyncio.shield(asyncio.wrap_future(engine.apply(function)))


def identity(
    config: MethodConfig,
    tensors: Mapping[str, Tensor],
    labels: tuple[str, ...],
    provenance: Mapping[str, object] | None,
) -> str:
    """The SHA-256 of an adapter: its configuration, its tensors (of any shapes), its classes and its template."""
    record = provenance or {}
    rendering = {key: record.get(key) for key in ("chat_template", "template_from", "template_kwargs", "settings")}
    about = [type(config).__name__, config.model_dump(mode="json"), list(labels), rendering]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
