"""The packed stream: sequences end to end, no pad token, attention per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from weft.core.layout import Layout
from weft.core.route import KeyValueCache, StreamRoute
from weft.core.stream import Part, Stream
from weft.layouts.building import embed, lay_out, run_body


@final
class Packed(Layout):
    """Sequences end to end; attention keeps them apart."""

    route = StreamRoute
    words = "over the packed stream"

    def stream(self, parts: Sequence[Part], *, cache: Any = None) -> Stream:
        return lay_out(self, parts, cache)

    def forward(self, stream: Stream) -> Tensor:
        with self.router.use(stream.route):
            hidden = embed(self.model, stream, self.adapters)
            types = {} if stream.token_types is None else {"token_type_ids": stream.token_types[None]}
            out = run_body(
                self.model, self.shape, hidden[None], stream.input_ids[None],
                position_ids=stream.position_ids[None], use_cache=False, **types,
            )  # fmt: skip
            # Some residual streams are float32 in every dtype; the model's own head takes rows of the model's.
            return out.last_hidden_state[0].to(hidden.dtype)

    def keys_values(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        recorder = _Recorder()
        self.forward(self.stream([Part(None, [input_ids.tolist()])], cache=recorder))
        return [recorder.layers[layer] for layer in sorted(recorder.layers)]


class _Recorder:
    """Stands where a cache would and keeps what the layers show it."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, **bias: Any) -> None:
        self.layers[layer] = (k, v)

    def part(self, first: int, count: int) -> KeyValueCache:
        raise AssertionError("a recorder sees the plain base only")
