"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2020; in parallel, He et al. 2021), with the results of
AdapterHub's ``adapters``.

A sub-layer adds s to the residual stream r. With D [m, d] and U [d, m], m = d // reduction_factor, it becomes
``s + scaling · (U f(D h + b) + c)``. Houlsby: h = s, after attention and MLP. Pfeiffer: h = s + r (where a norm follows
the addition, as in BERT: norm(s + r)), after the MLP only. Parallel: h = r, beside the MLP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2CLS, get_activation

from weft.core.adapter import Adapter, BuildContext, MethodConfig, SiteFunction
from weft.core.architecture import Architecture
from weft.core.route import Segment
from weft.errors import UserError, check_word
from weft.methods.adapterhub import adapterhub_settings
from weft.methods.bottleneck_places import Place, bottleneck_places, holders
from weft.methods.dropout import seeded_dropout
from weft.methods.initial import kaiming_uniform
from weft.methods.site_adapter import SiteAdapter
from weft.ops.grouped import RowForm
from weft.ops.products import linear

_PFEIFFER = {"mh_adapter": False, "original_ln_before": True, "non_linearity": "relu"}
_PARALLEL = {"mh_adapter": False, "is_parallel": True, "non_linearity": "relu", "reduction_factor": 2.0, "scaling": 4.0}
_PRESETS: dict[str, dict[str, object]] = {
    "houlsby": {}, "pfeiffer": _PFEIFFER, "parallel": _PARALLEL, "scaled_parallel": {**_PARALLEL, "scaling": "learned"},
}  # fmt: skip
_PRESETS |= dict(zip(("double_seq_bn", "seq_bn", "par_bn", "scaled_par_bn"), _PRESETS.values(), strict=True))
# AdapterHub's settings that Weft does not have, and why; a file may hold them if they are off.
_NOT_HERE = {
    "phm_layer": "Compacter's sums of Kronecker products are not built",
    "use_gating": "the gate is a mean over the whole sequence, so that a token would see those after it",
    "inv_adapter": "invertible adapters on the embeddings are not built",
    "cross_adapter": "there is cross-attention in encoder-decoder models only",
    "stochastic_depth": "dropping whole branches is for vision models; dropout is there",
}


class BottleneckConfig(MethodConfig):
    """Settings with AdapterHub's names and meanings; ``reduction_factor`` and ``init_weights`` have other defaults."""

    method: ClassVar[str] = "bottleneck"
    peft_type: ClassVar[str] = "BOTTLENECK"
    weights_file: ClassVar[str] = "adapter.safetensors"
    default_learning_rate: ClassVar[float] = 2e-4
    small_learning_rate: ClassVar[float | None] = 4e-3

    architecture: Literal[
        "houlsby", "pfeiffer", "parallel", "scaled_parallel", "double_seq_bn", "seq_bn", "par_bn", "scaled_par_bn"
    ] = Field(
        "houlsby",
        description="a preset for the keys that are not given, or AdapterHub's name for it; `houlsby`: the defaults",
    )
    mh_adapter: bool = Field(True, description="a layer after the attention")
    output_adapter: bool = Field(True, description="a layer after the MLP")
    reduction_factor: float | dict[str, float] | None = Field(
        None, description="the model's width over the layer's, also by block; default: 16, but a width of 64 or more"
    )
    non_linearity: str = Field("swish", description="activation between the two projections")
    original_ln_before: bool = Field(
        False, description="the layer reads the sum with the residual, normed if a norm follows"
    )
    original_ln_after: bool = Field(True, description="off: neither the residual nor a norm of the base comes after it")
    ln_before: bool = Field(False, description="a norm of its own before the layer")
    ln_after: bool = Field(False, description="a norm of its own after the layer")
    residual_before_ln: bool | Literal["post_add"] = Field(
        True, description="added to the sub-layer's output (`true`), the normed sum (`false`) or the sum (`post_add`)"
    )
    adapter_residual_before_ln: bool = Field(False, description="the addition comes before `ln_after`")
    is_parallel: bool = Field(False, description="beside the sub-layer and not after it")
    scaling: float | Literal["learned", "channel"] = Field(
        1.0, description="what the layer's output is multiplied with: a number, or learned (one, or per channel)"
    )
    init_weights: Literal["mam_adapter", "bert", "houlsby"] = Field(
        "mam_adapter", description="`mam_adapter` begins as the identity, `bert` and `houlsby` near it"
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout inside the layer")
    leave_out: list[int] = Field([], description="numbers of the blocks that get no layer")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        for key, why in _NOT_HERE.items():
            if values.get(key):
                raise ValueError(f"{key}: {values[key]!r}: {why}; leave it out (or off).")
        values = {"architecture": "houlsby"} | {key: value for key, value in values.items() if key not in _NOT_HERE}
        if isinstance(values.get("non_linearity"), str):
            values["non_linearity"] = values["non_linearity"].lower()
        if isinstance(by_layer := values.get("reduction_factor"), dict):
            values["reduction_factor"] = {str(layer): factor for layer, factor in by_layer.items()}
        return _PRESETS.get(str(values["architecture"]), {}) | values

    @model_validator(mode="after")
    def _check(self) -> BottleneckConfig:
        names = [key for key in self.factors if key != "default" and not key.isdecimal()]
        before, residual = self.original_ln_before, self.residual_before_ln
        if self.non_linearity not in ("relu", "gelu", "swish", "tanh", "leakyrelu"):  # any transformers has these
            check_word("non_linearity", self.non_linearity, sorted(set(ACT2CLS) - {"prelu", "xielu"}))
        for wrong, message in (
            (names, f"reduction_factor: {names}: keys are layer numbers from 0, and 'default'."),
            (min(self.factors.values(), default=1) <= 0, "reduction_factor: above 0, for the width is divided by it."),
            (self.scaling == 0, "scaling: 0 never changes anything; another number, 'learned' or 'channel'."),
            (self.is_parallel and (before or residual is not True), "is_parallel: true needs original_ln_before: false "
             f"and residual_before_ln: true; they are {str(before).lower()} and {str(residual).lower()}."),
            (self.adapter_residual_before_ln and (self.is_parallel or not self.ln_after),
             "adapter_residual_before_ln: true needs ln_after: true and is_parallel: false."),
            (residual == "post_add" and not before,
             "residual_before_ln: 'post_add' needs original_ln_before: true; else it is true or false."),
        ):  # fmt: skip
            if wrong:
                raise ValueError(message)
        return self

    @property
    def factors(self) -> dict[str, float]:
        """The reduction factor by layer; 'default' is that of all layers without a name."""
        given = self.reduction_factor
        return given if isinstance(given, dict) else {} if given is None else {"default": given}

    def width(self, hidden_size: int, layer: int) -> int:
        """m in one layer.

        Raises:
            UserError: The layer has no reduction factor.
        """
        if self.reduction_factor is None:
            return max(hidden_size // 16, min(64, hidden_size // 2))
        factor = self.factors.get(str(layer), self.factors.get("default"))
        if factor is None:
            raise UserError(f"bottleneck: reduction_factor says nothing of layer {layer}; add a 'default'.")
        return max(1, int(hidden_size // factor))

    def in_peft(self) -> dict[str, object]:
        depends = {"architecture", *(["reduction_factor"] if self.reduction_factor is None else [])}
        return self.model_dump(mode="json", exclude=depends)

    @classmethod
    def of_layout(cls, entries: Mapping[str, object]) -> Mapping[str, object]:
        found = entries.get("config")
        return found if isinstance(found, dict) else {}

    def own_layout(self, name: str, architecture: Architecture) -> dict[str, object]:
        d = architecture.hidden_size
        factor = {"reduction_factor": d / self.width(d, 0)} if self.reduction_factor is None else {}
        crossed = {"cross_adapter": self.mh_adapter} if architecture.stacks > 1 else {}
        return {
            "config": self.model_dump(mode="json", exclude={"architecture"}) | factor | crossed,
            "hidden_size": d,
            "model_type": architecture.model_type,
            "model_name": "",
            "name": name.replace(".", "_"),  # names in AdapterHub hold no dot
            "version": "adapters.1.3.0",
        }

    @classmethod
    def from_layout(cls, entries: dict[str, object]) -> MethodConfig | None:
        if "peft_type" in entries or "config" not in entries:
            return None
        found = adapterhub_settings(entries, cls.model_fields.keys() | _NOT_HERE.keys())
        try:
            return cls.model_validate({"init_weights": "bert", **found})
        except ValidationError as error:
            raise UserError(f"adapter_config.json: the configuration cannot be used: {error}") from error

    def build(self, name: str, context: BuildContext) -> Adapter:
        return Bottleneck(self, name, context)


class BottleneckLayer(nn.Module):
    """Down, non-linearity, up, on up to three modules of a block.

    ``read`` keeps the residual stream for ``forward``, which sits on the sub-layer's last linear. ``finish`` brings the
    result of ``forward`` past a norm.
    """

    def __init__(self, config: BottleneckConfig, place: Place, context: BuildContext) -> None:
        super().__init__()
        m = config.width(d := context.architecture.hidden_size, place.layer)
        self.path, self.config, self.place = place.path, config, place
        # It is no submodule, because its tensors are the base's.
        self.__dict__["norm"] = context.model.get_submodule(place.norm) if place.norm else None
        self.f = F.leaky_relu if config.non_linearity == "leakyrelu" else get_activation(config.non_linearity)
        self.down_weight = nn.Parameter(_initial(config, "down", (m, d), context))
        self.down_bias = nn.Parameter(context.zeros(m))
        self.up_weight = nn.Parameter(_initial(config, "up", (d, m), context))
        self.up_bias = nn.Parameter(context.zeros(d))
        for norm in ("norm_before",) * config.ln_before + ("norm_after",) * config.ln_after:
            self.register_parameter(f"{norm}_weight", nn.Parameter(context.zeros(d) + 1))
            self.register_parameter(f"{norm}_bias", nn.Parameter(context.zeros(d)))
        if not isinstance(config.scaling, float):
            self.scaling = nn.Parameter(context.zeros(1 if config.scaling == "learned" else d) + 1)
        # Rows on their way between modules of one block, by segment object: an adapter may have several segments.
        self.waiting: dict[int, Tensor] = {}

    def read(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """Keep x, the residual stream [..., d], at the module that takes it; y does not change."""
        self.waiting[id(segment)] = x
        return y

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """The sub-layer's output y [..., d] with the bottleneck's; the residual stream comes from ``read``."""
        c, norm = self.config, self.__dict__["norm"]
        r: Any = self.waiting.pop(id(segment), None)
        # ``more`` is the number of times that r counts, beside the one that the model adds.
        h, residual, more = y, y, 0
        if c.is_parallel:
            h = r
        elif c.original_ln_before and r is not None:
            h = y + r
            if norm is None:
                more = 0 if c.residual_before_ln else 1
            else:
                h = F.layer_norm(h, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
                residual = {True: y, False: h, "post_add": y + r}[c.residual_before_ln]
        change = self._change(h, segment)
        if c.adapter_residual_before_ln:
            out, more = self._own_norm(change + (residual + more * r if more else residual), "norm_after"), 0
        else:
            out = residual + (self._own_norm(change, "norm_after") if c.ln_after else change)
        if norm is not None and not c.original_ln_after:
            self.waiting[id(segment)] = out
            return y
        more -= not c.original_ln_after
        return out + more * r if more else out

    def row_form(self) -> RowForm | None:
        """``y + U f(D y + b) + c`` in place, where nothing else is set."""
        c = self.config
        if c.is_parallel or c.original_ln_before or c.ln_before or c.ln_after or c.scaling != 1.0:
            return None
        plain = c.original_ln_after and not self.place.norm and not self.place.read
        return RowForm(on_output=self._add_in_place) if plain else None

    def _add_in_place(self, y: Tensor) -> None:
        """Add the bottleneck of rows y [n, d] to them."""
        down, up = self.down_weight.to(y.dtype), self.up_weight.to(y.dtype)
        h = self.f(torch.addmm(self.down_bias.to(y.dtype), y, down.t()))
        y.addmm_(h, up.t()).add_(self.up_bias.to(y.dtype))

    def finish(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """Undo addition and norm (``original_ln_after: false``): the result of ``forward``, [..., d], at that norm."""
        return self.waiting.pop(id(segment))

    def _change(self, h: Tensor, segment: Segment) -> Tensor:
        dtype, scaling = h.dtype, self.config.scaling
        if self.config.ln_before:
            h = self._own_norm(h, "norm_before")
        h = self.f(linear(h, self.down_weight.to(dtype), self.down_bias.to(dtype)))
        h = linear(h, self.up_weight.to(dtype), self.up_bias.to(dtype))
        if scaling != 1.0:
            h = h * (scaling if isinstance(scaling, float) else self.scaling.to(dtype))
        return seeded_dropout(h, self.config.dropout, segment, self.path)

    def _own_norm(self, h: Tensor, name: str) -> Tensor:
        weight, bias = (self.get_parameter(f"{name}_{part}").to(h.dtype) for part in ("weight", "bias"))
        return F.layer_norm(h, weight.shape, weight, bias)


def _initial(config: BottleneckConfig, part: str, shape: tuple[int, int], context: BuildContext) -> Tensor:
    """AdapterHub's initial values; ``mam_adapter`` is Kaiming-uniform."""
    if config.init_weights == "bert":
        return context.normal(*shape, std=0.02)
    if config.init_weights == "houlsby":
        values = nn.init.trunc_normal_(torch.empty(shape), std=0.01, a=-0.02, b=0.02, generator=context.generator)
        return values.to(context.device, context.dtype)
    if part == "up":
        return context.zeros(*shape)
    return kaiming_uniform(context, *shape, inputs=shape[1])


class Bottleneck(SiteAdapter):
    """Bottlenecks after (or beside) the attention and MLP sub-layers."""

    def __init__(self, config: BottleneckConfig, name: str, context: BuildContext) -> None:
        places = bottleneck_places(config, context)
        super().__init__(config, name, {place.path: BottleneckLayer(config, place, context) for place in places})
        self.settings, self.holders = config, holders(context.architecture, places)

    def sites(self) -> Mapping[str, SiteFunction]:
        functions: dict[str, SiteFunction] = {}
        for layer in self.layers:
            assert isinstance(layer, BottleneckLayer)
            functions[layer.path] = layer
            if layer.place.read:
                functions[layer.place.read] = layer.read
            if layer.place.norm and not layer.config.original_ln_after:
                functions[layer.place.norm] = layer.finish
        return functions

    def stored_name(self, part: str) -> str:
        return part if part == "scaling" else ".".join(f"adapter_{part}".rsplit("_", 1))

    def _hub_names(self) -> Iterator[tuple[str, str, str]]:
        """A tensor's holder and name in AdapterHub's files, and its name in ours."""
        for holder, path, layer in zip(self.holders, self.paths, self.layers, strict=True):
            for part, _ in layer.named_parameters():
                own = self.stored_name(part)
                yield (
                    holder,
                    own.replace("down.", f"down.{int(self.settings.ln_before)}."),
                    f"{self.prefix}{path}.{own}",
                )
                if part.startswith("norm_before"):  # this name is also the first part before the non-linearity
                    yield holder, own.replace("norm_before", "down.0"), f"{self.prefix}{path}.{own}"

    def file_tensors(self) -> Mapping[str, Tensor]:
        return self.hub_tensors(self.name)

    def hub_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors, in their own shapes, under the names of AdapterHub's ``adapter.safetensors``."""
        own, name = self.tensors(), name.replace(".", "_")
        return {f"{holder}.adapters.{name}.{tail}": own[key] for holder, tail, key in self._hub_names()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors; AdapterHub's may have any adapter's name, and be of a model with or without its head."""
        own = {_UP_TO_LAYER.sub("", f"{holder}.{tail}"): key for holder, tail, key in self._hub_names()}
        short = {key: _UP_TO_LAYER.sub("", _HUB_TENSOR.sub(".", key)) for key in tensors}
        super().load_tensors({own.get(short[key], key): tensor for key, tensor in tensors.items()})


# AdapterHub's folders hold adapter_config.json and adapter.safetensors (or a pickle, which is never read).
# The part of a tensor's name that holds the adapter's, in all versions.
_HUB_TENSOR = re.compile(r"\.(?:(?:attention|layer)_text_(?:task|lang)_)?adapters\.[^.]+\.")
# The beginning of a name up to the block's number, or up to the stack's name in T5.
_UP_TO_LAYER = re.compile(r"^(?!(?:encoder|decoder)\.block\.).*?\.(?=(?:encoder|decoder)\.block\.|\d+\.)")
