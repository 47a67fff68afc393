"""The choice of a layout for a base."""

from __future__ import annotations

from weft.core.architecture import Architecture
from weft.core.layout import Layout
from weft.errors import UserError
from weft.layouts.encoder_decoder import EncoderDecoder
from weft.layouts.packed import Packed
from weft.layouts.padded_batch import Padded


def layout_for(shape: Architecture, padded: bool | None = None, exact: bool = False) -> type[Layout]:
    """The layout in which the base runs; ``padded`` None: padded batches only if it can do nothing else.

    Raises:
        UserError: The base cannot run as ``padded`` and ``exact`` say.
    """
    only = shape.install_attention is None
    if not (only if padded is None else padded):
        if only:
            raise UserError(f"{shape.model_type} models can only run padded batches; leave out padded=False.")
        return Packed
    if exact:
        raise UserError("exact mode needs the packed stream; padded batches pad by the longest neighbour.")
    return EncoderDecoder if shape.stacks > 1 else Padded
