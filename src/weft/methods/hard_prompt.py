"""A hard prompt: the embeddings of a written text in the place of a soft prompt. Nothing is trained; it is the baseline
of the other prompt methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from weft.base.embeddings import input_embeddings
from weft.core.adapter import Adapter, BuildContext
from weft.core.architecture import Architecture
from weft.errors import UserError
from weft.methods.encoder import KEY, text_ids
from weft.methods.prompt_tuning import SoftPromptConfig, VirtualTokens, embedded, embedding_width


class HardPromptConfig(SoftPromptConfig):
    """A text and its place.

    Its tokens are virtual: the chat template does not see them, and the text around them is tokenised without them.
    """

    method: ClassVar[str] = "hard_prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    combination_types: ClassVar[tuple[str, ...]] = ()  # texts cannot be averaged
    instead_of_merging: ClassVar[str] = "Put its text into a system message (weft chat --system) or the chat template."

    prompt_text: str | None = Field(None, description="the text")
    prompt_ids: list[int] | None = Field(None, description="its token ids instead")

    @model_validator(mode="after")
    def _one_of_two(self) -> HardPromptConfig:
        if (self.prompt_text is None) == (self.prompt_ids is None):
            raise ValueError("hard_prompt needs prompt_text (or prompt_ids instead): the text to put there")
        if not (self.prompt_text or self.prompt_ids):
            raise ValueError("prompt_text (prompt_ids) is empty; write a text")
        return self

    def build(self, name: str, context: BuildContext) -> Adapter:
        ids = self.prompt_ids
        if ids is None:
            assert self.prompt_text is not None
            ids = text_ids(self.prompt_text, "prompt_text", context)
        # With its ids in it the adapter's folder needs no tokenizer.
        return HardPrompt(HardPromptConfig(prompt_ids=ids, virtual_position=self.virtual_position), name, context)

    def in_peft(self) -> dict[str, object]:
        count = {} if self.prompt_ids is None else {"num_virtual_tokens": len(self.prompt_ids)}
        return {"peft_type": super().in_peft()["peft_type"], **count}

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        # To peft it is prompt tuning with these rows.
        assert self.prompt_ids is not None
        entries = {"num_virtual_tokens": len(self.prompt_ids), "prompt_tuning_init": "RANDOM"}
        return {**super().to_peft(architecture), **entries}


class HardPrompt(VirtualTokens):
    """Rows of the base's table of embeddings. They are a buffer, because they are not trained."""

    rows: Tensor

    def __init__(self, config: HardPromptConfig, name: str, context: BuildContext) -> None:
        super().__init__(config, name)
        self.position = config.virtual_position
        ids = config.prompt_ids or []
        table = input_embeddings(context.model).weight
        stray = [i for i in ids if not 0 <= i < len(table)]
        if stray:
            raise UserError(f"prompt_ids: {stray[0]} is no token; this base has 0 to {len(table) - 1}.")
        empty = context.zeros(len(ids), embedding_width(context))
        rows = empty if context.blank else embedded(torch.tensor(ids), context)
        self.register_buffer("rows", rows.to(context.device, context.dtype, copy=True))
        self.num_virtual_tokens = len(ids)

    def virtual_tokens(self, seed: int | None = None) -> Tensor:
        return self.rows

    def tensors(self) -> Mapping[str, Tensor]:
        return {KEY: self.rows}
