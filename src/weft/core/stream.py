"""A batch: what goes into it, and how it lies when it was laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from torch import Tensor

from weft.core.route import Route


@dataclass(frozen=True)
class Part:
    """The sequences (token ids) of one adapter in a batch; ``adapter`` None is the plain base.

    ``answers`` and ``slots``: per sequence, where its answer begins and the places its template names, for adapters
    whose virtual tokens stand there (``Adapter.places``). ``neftune_alpha``: noise on the embeddings in training.
    ``token_types``: per sequence, the segment of each token; nothing, or an empty sequence: all 0. ``targets``: per
    sequence, what an encoder-decoder is to write. ``shared``: per sequence, how many of its first tokens are those of
    the last sequence before it that shares nothing (0); a layout that can computes them once.
    """

    adapter: str | None
    sequences: Sequence[Sequence[int]]
    seed: int | None = None
    _: KW_ONLY
    answers: Sequence[int | None] = ()
    slots: Sequence[Sequence[int]] = ()
    neftune_alpha: float = 0.0
    token_types: Sequence[Sequence[int]] = ()
    targets: Sequence[Sequence[int]] = ()
    shared: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A batch, laid out.

    Attributes:
        input_ids, position_ids: [N] int64; rows of virtual tokens hold id 0, their embedding is put in later.
        lengths: of each sequence the rows of its own, virtual tokens included.
        rows: stream row of every own token, one tuple per sequence; sequences may share their first rows.
        virtual_rows: for each segment with virtual tokens, the rows they take, [sequences * num_virtual_tokens].
        virtual_numbers: which virtual token each of these rows is, where not every sequence has all in order.
        prefix_length: learned keys that each sequence sees before its own.
        route: where each row goes.
        standing: of each sequence the row whose hidden state stands for all of it.
        token_types: [N] int64, or None: all 0. Virtual tokens have type 0, as in PEFT.
        joints: a row that follows shared ones -> the last of these.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    rows: tuple[Sequence[int], ...]
    virtual_rows: Mapping[int, Tensor]
    prefix_length: tuple[int, ...]
    route: Route
    standing: tuple[int, ...]
    token_types: Tensor | None = None
    virtual_numbers: Mapping[int, Tensor] = field(default_factory=dict)
    joints: Mapping[int, int] = field(default_factory=dict)

    def before(self, row: int) -> int:
        """The row before this one in its sequence."""
        return self.joints.get(row, row - 1)
