"""POST /classify: the classes of texts, by an adapter that was trained to name them."""

from __future__ import annotations

import asyncio
import secrets
import time

from weft.data import Sample
from weft.errors import UserError
from weft.evaluate.classify import Predictions, predict
from weft.serve.answers import ClassifiedText, ClassifyAnswer
from weft.serve.envelope import bad_request
from weft.serve.requests import ClassifyRequest
from weft.serve.service import Service


async def classify(service: Service, asked: ClassifyRequest) -> ClassifyAnswer:
    """The probability of every class, for every text.

    Raises:
        ApiError: The model has no classes, or a text cannot be read.
    """
    served = service.registry.find(asked.model)
    internal = served.internal
    if internal is None or not served.labels:
        what = f"'{served.name}' has no classes: it was not trained to classify. /v1/models lists the labels of others."
        raise bad_request(what, "model", "no_classes")
    texts = [asked.input] if isinstance(asked.input, str) else list(asked.input)
    service.admission.enter(1)
    service.registry.enter(served)
    began = time.monotonic()
    try:
        samples = await service.in_order(lambda: [query.prompt for query in served.target.queries(texts, internal)])
        found = await _predicted(service, internal, samples)
    finally:
        service.admission.leave(1, time.monotonic() - began)
        await service.registry.leave(served)
    data: list[ClassifiedText] = [
        {"index": index, "label": found.names[label], "probs": probabilities, "num_classes": len(found.names)}
        for index, (label, probabilities) in enumerate(zip(found.labels, found.probabilities.tolist(), strict=True))
    ]
    read = sum(len(sample.input_ids) for sample in samples)
    service.metrics.read.add(served.name, by=read)
    service.metrics.whole.observe(served.name, time.monotonic() - began)
    return {
        "id": f"classify-{secrets.token_hex(12)}",
        "object": "list",
        "created": int(time.time()),
        "model": asked.model,
        "labels": list(found.names),
        "data": data,
        "usage": {"prompt_tokens": read, "total_tokens": read},
    }


async def _predicted(service: Service, internal: str, samples: list[Sample]) -> Predictions:
    """The predictions, computed between two steps of the engine, unless the client goes before."""
    wanted = service.engine.apply(lambda: predict(service.target.adapters, internal, samples))
    try:
        return await asyncio.wrap_future(wanted)
    except UserError as error:
        raise bad_request(str(error), "input", "invalid_value") from None
