"""LLaMA-Pro (Wu et al. 2024), block expansion: the base's L blocks form groups of equal size, and a new block follows
each group, a copy of the group's last one. Only the new blocks are trained.

A block computes ``x' = x + Attn(n(x))``, ``y = x' + MLP(n(x'))``. With the last linear of both sub-layers set to zero
(and their biases) it is ``y = x``: the expanded model begins exactly as the base.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.base.checkpointing import How, checkpoint_alike, disable_checkpointing
from weft.base.embeddings import input_embeddings
from weft.base.streaming import Streaming, stop_streaming
from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.route import Router
from weft.core.site import Site, detach
from weft.errors import UserError
from weft.methods.dense import dequantize_linears, kind_of
from weft.methods.site_adapter import SiteAdapter


class LlamaProConfig(MethodConfig):
    """The number of the added blocks."""

    method: ClassVar[str] = "llama_pro"
    peft_type: ClassVar[str] = "LLAMA_PRO"
    default_learning_rate: ClassVar[float] = 2e-4
    small_learning_rate: ClassVar[float | None] = 2e-3
    whole_values: ClassVar[bool] = True
    tasks: ClassVar[frozenset[str]] = frozenset({"causal_lm", "sequence_classification"})

    num_new_blocks: int | None = Field(
        None, gt=0, description="how many, evenly spread; default: one for every four blocks, but no fewer than four"
    )

    def build(self, name: str, context: BuildContext) -> Adapter:
        return LlamaPro(self, name, context)

    def groups(self, layers: int) -> list[int]:
        """The number of each group's last block.

        Raises:
            UserError: There are more new blocks than blocks.
        """
        count = self.num_new_blocks or max(layers // 4, min(layers, 4))
        if count > layers:
            raise UserError(f"llama_pro: num_new_blocks {count}: this model has {layers} blocks, so 1 to {layers}.")
        return [(i + 1) * layers // count - 1 for i in range(count)]


class InsertedBlock(nn.Module):
    """A block of the base's kind. Its parameters have the adapter's dtype; it computes in the base's."""

    stored_whole = True

    def __init__(self, block: nn.Module, context: BuildContext) -> None:
        super().__init__()
        self.dtypes = {name: p.dtype for name, p in block.named_parameters()}
        for module in block.modules():
            for part, parameter in module.named_parameters(recurse=False):
                own = parameter.detach().to(context.dtype)
                module.register_parameter(part, nn.Parameter(own))
        self.block = block

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, ...]:
        """The block's own output, [1, N, d] or padded [B, T, d] as ``hidden``, alone or first in a tuple."""
        rounded = {n: p.to(self.dtypes[n]) for n, p in self.block.named_parameters() if p.dtype != self.dtypes[n]}
        if not rounded:
            return self.block(hidden, *args, **kwargs)
        return torch.func.functional_call(self.block, rounded, (hidden, *args), kwargs)

    def merged_tensors(self) -> Mapping[str, Tensor]:
        """The block's tensors, in their own shapes, rounded to the base's dtypes as in the forward pass."""
        return {name: t.detach().to(self.dtypes.get(name, t.dtype)) for name, t in self.block.state_dict().items()}


class LlamaPro(Adapter):
    """The new blocks, stored whole as ``base_model.model.<path of the block before>.inserted.0.<parameter>``."""

    def __init__(self, config: LlamaProConfig, name: str, context: BuildContext) -> None:
        super().__init__(config, name)
        shape = context.architecture
        _check(context)
        self.paths = [shape.blocks[i] for i in config.groups(shape.num_layers)]
        self.blocks = nn.ModuleList(
            _new_block(path, shape.num_layers + number, context) for number, path in enumerate(self.paths)
        )

    def inserted_blocks(self) -> Mapping[str, Sequence[nn.Module]]:
        return {path: [block] for path, block in zip(self.paths, self.blocks, strict=True)}

    def tensors(self) -> Mapping[str, Tensor]:
        return {
            f"{SiteAdapter.prefix}{path}.inserted.0.{part.removeprefix('block.')}": parameter
            for path, block in zip(self.paths, self.blocks, strict=True)
            for part, parameter in block.named_parameters()
        }


def _copy(block: nn.Module, shared: tuple[type, ...]) -> nn.Module:
    """A deep copy that shares the model's configuration and every object of the ``shared`` types (routers, sites)."""
    memo: dict[int, object] = {}
    for module in block.modules():
        for key, value in module.__dict__.items():
            if key == "config" or isinstance(value, shared):
                memo[id(value)] = value
    return copy.deepcopy(block, memo)


def _new_block(path: str, number: int, context: BuildContext) -> nn.Module:
    """A copy of the block at ``path`` that is the identity; ``number`` is its layer in a KV cache."""
    shape, source = context.architecture, context.model.get_submodule(path)
    block = _copy(source, (Router, Site, How, Streaming))
    for module in block.modules():
        detach(module)
        if isinstance(getattr(module, "layer_idx", None), int):
            module.__dict__["layer_idx"] = number
    stop_streaming(block)
    disable_checkpointing(block)
    # A quantised weight cannot be trained; its numbers can.
    dequantize_linears(block, input_embeddings(context.model).weight.dtype)
    for outputs in (shape.attention_output, shape.mlp_output):
        last = [p.removeprefix(f"{path}.") for p in outputs if p.startswith(f"{path}.")]
        for parameter in block.get_submodule(last[0]).parameters():
            nn.init.zeros_(parameter)
    new = InsertedBlock(block, context)
    for unreached in shape.unreachable:
        if unreached.startswith(f"{path}."):
            new.block.get_submodule(unreached.removeprefix(f"{path}.")).requires_grad_(False)
    checkpoint_alike(new, source)
    return new


def _check(context: BuildContext) -> None:
    """Refuse a base on which a block with zeros in its last linears is not the identity, or cannot be trained."""
    shape = context.architecture
    # A norm after the sum changes what the zeros leave alone.
    if shape.norms_sums:
        raise UserError(
            f"llama_pro: this {shape.model_type} model normalises after the residual sum, so no block of it can begin "
            "as the identity. Take another method (bottleneck, for one)."
        )
    for path in shape.blocks:
        block = context.model.get_submodule(path)
        known = all(any(p.startswith(f"{path}.") for p in last) for last in (shape.attention_output, shape.mlp_output))
        if not known or any("expert" in name for name, _ in block.named_parameters()):
            raise UserError(
                f"llama_pro: the last linear of the attention or of the MLP of block '{path}' of this "
                f"{shape.model_type} model is not known (experts have many), so it cannot begin as the identity."
            )
        if not all(p.dtype.is_floating_point or kind_of(p) for p in block.parameters()):
            raise UserError(
                f"llama_pro: block '{path}' is quantised in a way that Weft cannot undo, so a copy of it cannot be "
                "trained. Load the base in bf16 or fp32."
            )
