"""LoRA layers that compute more than ``s B A x``: PiSSA's, which subtract their beginning, and DoRA's.

PiSSA (Meng et al. 2024) trains the principal part of W on a base without it. Here the base is never written, so the
layer computes ``s (B A - B0 A0) x`` with the first values B0 A0: the same function, and the identity at first.

DoRA (Liu et al. 2024, eq. 5) gives every output its own length: ``W' = m (W + s B A) / ||W + s B A||``, the norm over a
row of the weight, m trained and ||W|| at first. As the paper proposes in section 4.3, the norm has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core.adapter import BuildContext
from weft.core.route import Segment
from weft.methods.dense import dense_weight
from weft.methods.dropout import seeded_dropout
from weft.methods.mergeable import MergedModule
from weft.ops.lowrank import low_rank, row_norms


class VariantLinear(nn.Module):
    """LoRA on one linear module with PiSSA's beginning taken away, DoRA's magnitude, or both.

    Args:
        a: [r, in].
        b: [out, r].
        pissa: Keep copies of a and b, whose product is subtracted.
        dora: Train a magnitude [out].
    """

    stored_whole = ("lora_magnitude_vector",)
    base: nn.Module

    def __init__(
        self, path: str, base: nn.Module, a: Tensor, b: Tensor, scaling: float, dropout: float, context: BuildContext,
        *, pissa: bool, dora: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.__dict__["base"] = base  # no submodule, because its tensors are not the adapter's
        self.path, self.scaling, self.dropout = path, scaling, dropout
        self.lora_A, self.lora_B = nn.Parameter(a.contiguous()), nn.Parameter(b.contiguous())
        self.register_buffer("initial_a", a.clone(memory_format=torch.contiguous_format) if pissa else None)
        self.register_buffer("initial_b", b.clone(memory_format=torch.contiguous_format) if pissa else None)
        self.lora_magnitude_vector: nn.Parameter | None = None
        if dora:
            self.lora_magnitude_vector = nn.Parameter(context.zeros(len(b)) if context.blank else self.norms())

    initial_a: Tensor | None
    initial_b: Tensor | None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r or 2 r, in] and B [out, r or 2 r] whose product is the change of the weight, without the scaling."""
        if self.initial_a is None or self.initial_b is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.initial_a]), torch.cat([self.lora_B, -self.initial_b], dim=1)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """``||W + s B A||`` per output, [out]."""
        a, b = self.factors()
        return row_norms(dense_weight(self.base, a.dtype), a, b, self.scaling)

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """y [..., out] with the update for x [..., in]."""
        dropped = seeded_dropout(x, self.dropout, segment, self.path)
        update = low_rank(dropped, self.lora_A, self.lora_B, y.dtype)
        if self.initial_a is not None and self.initial_b is not None:
            # Two products and not one of rank 2 r, because equal ones cancel exactly at first. And x without dropout,
            # because this is a part of the frozen weight.
            update = update - low_rank(x, self.initial_a, self.initial_b, y.dtype)
        update = update * self.scaling
        if self.lora_magnitude_vector is None:
            return y + update
        length = (self.lora_magnitude_vector / self.norms()).to(y.dtype)
        if dropped is x:
            bias = self.base._parameters.get("bias")
            plain = y if bias is None else y - bias
        else:
            plain = dropped.to(y.dtype) @ dense_weight(self.base, y.dtype).t()
        return y + (length - 1) * plain + length * update

    def merge_into(self, merged: MergedModule) -> None:
        """W + s B A. DoRA's lengths are those of the base's weight, and do not change its bias."""
        a, b = (merged.cast(factor) for factor in self.factors())
        merged.add_low_rank(a, b, self.scaling)
        if self.lora_magnitude_vector is None:
            return
        length = merged.cast(self.lora_magnitude_vector) / row_norms(merged.base_weight, a, b, self.scaling)
        bias = merged.bias
        if bias is not None:
            base = merged.base_bias
            bias = length * bias if base is None else length * (bias - base) + base
        merged.put(length[:, None] * merged.weight, bias)


class LoraEmbedding(nn.Module):
    """LoRA on the table of token embeddings E [vocabulary, d]: ``E[x] + s (Aᵀ[x]) Bᵀ``.

    As in PEFT, A [r, vocabulary] begins as zero and B [d, r] Gaussian. DoRA's lengths are those of E's columns.
    """

    stored_whole = ("lora_magnitude_vector",)
    base: nn.Embedding

    def __init__(
        self, r: int, base: nn.Embedding, scaling: float, context: BuildContext, *, dora: bool, identity: bool
    ) -> None:
        super().__init__()
        self.__dict__["base"] = base
        rows, d = base.num_embeddings, base.embedding_dim
        self.scaling = scaling
        a = context.zeros(r, rows) if identity else context.normal(r, rows, std=1.0)
        self.lora_embedding_A, self.lora_embedding_B = nn.Parameter(a), nn.Parameter(context.normal(d, r, std=1.0))
        self.lora_magnitude_vector: nn.Parameter | None = None
        if dora:
            self.lora_magnitude_vector = nn.Parameter(context.zeros(d) if context.blank else self.norms())

    @torch.no_grad()
    def norms(self) -> Tensor:
        """``||E + s (B A)ᵀ||`` per column, [d]."""
        a, b = self.lora_embedding_A, self.lora_embedding_B
        return row_norms(self.base.weight.to(a.dtype).t(), a, b, self.scaling)

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """y [..., d] with the update for the ids x [...]."""
        base = self.base
        rows = F.embedding(x, self.lora_embedding_A.t(), padding_idx=base.padding_idx)
        update = (rows @ self.lora_embedding_B.t() * self.scaling).to(y.dtype)
        scale = getattr(base, "embed_scale", None)
        update = update if scale is None else update * scale
        if self.lora_magnitude_vector is None:
            return y + update
        length = (self.lora_magnitude_vector / self.norms()).to(y.dtype)
        return y + (length - 1) * y + length * update

    def merge_into(self, merged: MergedModule) -> None:
        """E + s (B A)ᵀ, DoRA's lengths by column."""
        a, b = merged.cast(self.lora_embedding_A), merged.cast(self.lora_embedding_B)
        merged.add_low_rank(b.t(), a.t(), self.scaling)
        if self.lora_magnitude_vector is not None:
            norms = row_norms(merged.base_weight.t(), a, b, self.scaling)
            merged.put(merged.weight * (merged.cast(self.lora_magnitude_vector) / norms), merged.bias)
