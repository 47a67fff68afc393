"""From a target to what answers."""

from __future__ import annotations

from pathlib import Path

from weft.assets import EMBEDDED_MODELS
from weft.errors import UserError
from weft.generation.limits import Limits
from weft.generation.request import Request
from weft.generation.target import Target
from weft.serve.admission import Admission
from weft.serve.endpoints import Endpoints
from weft.serve.metrics import Metrics
from weft.serve.registry import Registry
from weft.serve.service import Service
from weft.serve.settings import ServeSettings
from weft.training.same_run import base_fingerprint

_FIRST = 120.0  # seconds for the first token that is ever written


def make_endpoints(target: Target, settings: ServeSettings, metrics: Metrics) -> Endpoints:
    """Endpoints whose engine has written a token, so that the first client does not wait for what is done once.

    The calling thread runs the engine next (``Service.run``).

    Raises:
        UserError: Two models would have one name, or the engine does not run.
    """
    writes = target.adapters.architecture.writes
    engine = target.engine(Limits(max_rows=settings.max_rows, cache_bytes=settings.cache_bytes))
    registry = Registry(
        target,
        engine,
        settings.model_name or base_name(target.base.name),
        max_adapters=settings.max_adapters,
        metrics=metrics,
    )
    try:
        if writes:
            engine.submit(Request([0], None, 1)).result(_FIRST)
        engine.claim()
    except BaseException:
        engine.close()
        raise
    service = Service(
        settings,
        target,
        engine,
        registry=registry,
        admission=Admission(settings.max_rows, settings.max_waiting),
        metrics=metrics,
        fingerprint=f"fp_{str(base_fingerprint(target.base)['sha256_of_small_tensors'])[:12]}",
    )
    return Endpoints(service)


def base_name(name: str) -> str:
    """What clients call a base: a hub's id, an embedded name, or the name of its folder.

    Raises:
        UserError: It has none.
    """
    if name in EMBEDDED_MODELS or not Path(name).is_dir():
        return name
    found = Path(name).resolve().name
    if not found:
        raise UserError(f"the base at {name} has no name; give it one with --model-name.")
    return found
