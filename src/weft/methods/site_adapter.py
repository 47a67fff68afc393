"""An adapter whose parameters hang on base modules, and what reading an adapter's tensors from a file asks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.core.adapter import Adapter, MethodConfig, SiteFunction
from weft.core.route import Segment
from weft.errors import UserError


class SavesModules(MethodConfig):
    """Of a method that can train whole base modules beside its own parameters: endings of their paths, as in PEFT
    (``norm`` is every ``input_layernorm`` too; ``model.norm`` is one).

    The adapter hands ``weft.methods.own_weights.saved_modules`` of them to ``SiteAdapter``.
    """

    modules_to_save: list[str] | None = Field(
        None, description="endings of the paths of base modules that are trained whole beside it"
    )


class SiteAdapter(Adapter):
    """An adapter whose parameters hang on base modules: one small module per site, which is its site function.

    A parameter ``part`` at module ``path`` is stored as ``base_model.model.<path>.<part, '_' as the method says>``.
    ``own``: base tensors that are trained whole beside them (``weft.methods.own_weights``).
    """

    prefix = "base_model.model."

    def __init__(
        self,
        config: MethodConfig,
        name: str,
        layers: Mapping[str, nn.Module],
        own: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(config, name)
        self.paths = list(layers)
        self.layers = nn.ModuleList(layers.values())
        self.own_paths = list(own or {})
        self.own = nn.ModuleList((own or {}).values())

    def stored_name(self, part: str) -> str:
        """The file's name for the parameter ``part`` of a layer."""
        return part

    def sites(self) -> Mapping[str, SiteFunction]:
        functions: dict[str, SiteFunction] = dict(zip(self.paths, self.layers, strict=True))
        for path, weights in zip(self.own_paths, self.own, strict=True):
            # A layer may take the base's bias apart, so it comes before the own bias is put in.
            functions[path] = in_order([functions[path], weights]) if path in functions else weights
        return functions

    def merges(self) -> Mapping[str, Sequence[nn.Module]]:
        layers: dict[str, list[nn.Module]] = {path: [m] for path, m in zip(self.paths, self.layers, strict=True)}
        for path, weights in zip(self.own_paths, self.own, strict=True):
            layers.setdefault(path, []).append(weights)
        return layers

    def tensors(self) -> Mapping[str, Tensor]:
        names = self._names()
        return {key: tensor for key, tensor in self._named().items() if names[key] == key}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(self.once(tensors))

    def once(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, in their shapes, each once: peft's may have a tied one under any of its names.

        Raises:
            UserError: A tied tensor has two values.
        """
        names = self._names()
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            first = found.setdefault(names.get(key, key), tensor)
            if first is not tensor and not torch.equal(first, tensor):
                raise UserError(f"tensor '{key}' differs from '{names[key]}', and in this base the two are tied.")
        return found

    def _names(self) -> dict[str, str]:
        """The one name in our files, that of its first module, by each name that a parameter has."""
        first: dict[int, str] = {}
        return {key: first.setdefault(id(tensor), key) for key, tensor in self._named().items()}

    def _named(self) -> dict[str, Tensor]:
        """The parameters by their names in the file; one on several modules has several."""
        tensors: dict[str, Tensor] = {
            f"{self.prefix}{path}.{self.stored_name(part)}": parameter
            for path, layer in zip(self.paths, self.layers, strict=True)
            for part, parameter in layer.named_parameters()
        }
        for path, weights in zip(self.own_paths, self.own, strict=True):
            # peft wraps the modules it tunes, and calls the module inside the base layer.
            inside = getattr(weights, "wrapper", "base_layer." if path in self.paths else "")
            for part, parameter in weights.named_parameters():
                tensors[f"{self.prefix}{path}.{inside}{part}"] = parameter
        return tensors


def in_order(functions: Sequence[SiteFunction]) -> SiteFunction:
    """One site function that applies several, each to the result of the one before."""

    def run(x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        for function in functions:
            y = function(x, y, segment)
        return y

    return run
