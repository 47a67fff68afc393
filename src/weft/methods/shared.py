"""Frozen tensors that all layers of an adapter share: random projections, tables, bases."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from weft.core.adapter import MethodConfig
from weft.methods.site_adapter import SiteAdapter


class SharedSiteAdapter(SiteAdapter):
    """A ``SiteAdapter`` with frozen tensors beside its layers, given by name.

    They are buffers. A checkpoint holds them, and with ``stored`` the adapter's file holds them as
    ``base_model.<name>``. Loading copies into them, so that layers with a reference see the file's values.
    """

    def __init__(
        self,
        config: MethodConfig,
        name: str,
        layers: Mapping[str, nn.Module],
        shared: Mapping[str, Tensor],
        *,
        stored: bool = True,
    ) -> None:
        super().__init__(config, name, layers)
        self.stored = tuple(shared) if stored else ()
        for key, tensor in shared.items():
            self.register_buffer(key, tensor)

    def tensors(self) -> Mapping[str, Tensor]:
        return {**super().tensors(), **{f"base_model.{key}": self.get_buffer(key) for key in self.stored}}
