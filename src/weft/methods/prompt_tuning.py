"""Prompt tuning (Lester et al. 2021): learned embeddings [n, d] stand before each sequence; nothing else is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from weft.core.adapter import Adapter
from weft.core.architecture import Architecture
from weft.core.config import BuildContext, MethodConfig
from weft.errors import UserError


class PromptTuningConfig(MethodConfig):
    """PEFT's names. Unlike PEFT the default initialisation is sampled vocabulary, which the paper found better than
    random."""

    method: ClassVar[str] = "prompt_tuning"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    default_learning_rate: ClassVar[float] = 3e-2
    harmless_keys: ClassVar[frozenset[str]] = frozenset(
        {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "tokenizer_kwargs",
         "tokenizer_name_or_path"}
    )  # fmt: skip

    num_virtual_tokens: int = Field(default=20, gt=0)
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "SAMPLE_VOCAB"
    prompt_tuning_init_text: str | None = None

    @model_validator(mode="after")
    def _text_goes_with_text(self) -> PromptTuningConfig:
        if self.prompt_tuning_init == "TEXT" and not self.prompt_tuning_init_text:
            raise ValueError("prompt_tuning_init TEXT needs prompt_tuning_init_text")
        return self

    def build(self, name: str, context: BuildContext) -> Adapter:
        return PromptTuning(self, name, context)

    def to_peft(self, architecture: Architecture) -> dict[str, Any]:
        # How it began does not matter at inference, and PEFT would want a tokenizer for TEXT.
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "prompt_tuning_init": "RANDOM",
            "token_dim": architecture.embedding_size or architecture.hidden_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": architecture.num_heads,
            "num_layers": architecture.num_layers,
        }

    @classmethod
    def from_peft(cls, entries: dict[str, Any], keys: list[str]) -> MethodConfig:
        how = {"prompt_tuning_init", "prompt_tuning_init_text"}
        return super().from_peft({k: v for k, v in entries.items() if k not in how}, keys)


class PromptTuning(Adapter):
    """The learned rows."""

    def __init__(self, config: PromptTuningConfig, name: str, context: BuildContext) -> None:
        super().__init__(config, name)
        self.num_virtual_tokens = config.num_virtual_tokens
        self.prompt = nn.Parameter(_initial_prompt(config, context).to(context.device, context.dtype, copy=True))

    def virtual_tokens(self) -> Tensor:
        return self.prompt

    def tensors(self) -> Mapping[str, Tensor]:
        return {"prompt_embeddings": self.prompt}


def _initial_prompt(config: PromptTuningConfig, context: BuildContext) -> Tensor:
    table = context.model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    n = config.num_virtual_tokens
    if context.blank:
        return context.zeros(n, table.shape[1])
    if config.prompt_tuning_init == "RANDOM":
        return context.normal(n, table.shape[1], std=float(table.float().std()))
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        ids = torch.randint(len(table), (n,), generator=context.generator)
        return table[ids.to(table.device)]
    if context.tokenizer is None:
        raise UserError("prompt_tuning_init TEXT needs the tokenizer: pass tokenizer= to Adapters.add.")
    ids = context.tokenizer(config.prompt_tuning_init_text)["input_ids"]
    return table[torch.tensor((ids * (n // len(ids) + 1))[:n], device=table.device)]
