"""Prompt tuning (Lester et al. 2021): from ``p(Y | X)`` to ``p(Y | [P; X])`` with learned embeddings P [n, d], and
nothing else trained. P may also stand right before the answer, or at slots of the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from weft.base.embeddings import input_embeddings
from weft.core.adapter import Adapter, BuildContext, MethodConfig, Run
from weft.core.architecture import Architecture
from weft.errors import UserError
from weft.methods.encoder import EncodedRows, RowEncoder, repeated, sampled_ids, text_ids

Position = Literal["before", "after", "slots"]


class SoftPromptConfig(MethodConfig):
    """The common settings of methods with virtual tokens."""

    harmless_keys: ClassVar[frozenset[str]] = frozenset(
        {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "tokenizer_kwargs",
         "tokenizer_name_or_path"}
    )  # fmt: skip

    not_in_peft: ClassVar[frozenset[str]] = frozenset({"virtual_position"})
    peft_defaults: ClassVar[Mapping[str, object]] = {"num_virtual_tokens": None}

    virtual_position: Position = Field(
        "before",
        description="before the text, `after` the prompt (right before the answer), or at the template's `slots`",
    )

    def in_peft(self) -> dict[str, object]:
        return {**super().in_peft(), "peft_type": self._stored_type()}

    def _stored_type(self) -> str:
        # PEFT would load the file and put the rows before the text. It refuses a type that it does not know.
        before = self.virtual_position == "before"
        return self.peft_type if before else f"{self.peft_type}_{self.virtual_position.upper()}"

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        entries: dict[str, object] = {
            "token_dim": architecture.embedding_size or architecture.hidden_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": architecture.num_heads,
            "num_layers": architecture.num_layers,
        }
        if self.virtual_position != "before":
            entries["peft_type"] = self._stored_type()
        return entries


class PromptTuningConfig(SoftPromptConfig):
    """Settings with PEFT's names. Unlike PEFT's, the default initialisation is sampled vocabulary: the paper found it
    better than random."""

    method: ClassVar[str] = "prompt_tuning"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    default_learning_rate: ClassVar[float] = 3e-2
    small_learning_rate: ClassVar[float | None] = 0.2
    not_in_peft: ClassVar[frozenset[str]] = SoftPromptConfig.not_in_peft | {
        "prompt_tuning_init", "prompt_tuning_init_text"
    }  # fmt: skip
    peft_defaults: ClassVar[Mapping[str, object]] = {**SoftPromptConfig.peft_defaults, "prompt_tuning_init": "RANDOM"}

    num_virtual_tokens: int = Field(50, gt=0, description="learned tokens")
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = Field(
        "SAMPLE_VOCAB", description="where their first values come from; sampled vocabulary is better than random"
    )
    prompt_tuning_init_text: str | None = Field(None, description="with `TEXT`: the text")

    @model_validator(mode="after")
    def _text_goes_with_text(self) -> PromptTuningConfig:
        if self.prompt_tuning_init == "TEXT" and not self.prompt_tuning_init_text:
            raise ValueError("prompt_tuning_init TEXT needs prompt_tuning_init_text")
        if self.prompt_tuning_init != "TEXT" and self.prompt_tuning_init_text is not None:
            raise ValueError("prompt_tuning_init_text is only read with prompt_tuning_init: TEXT")
        return self

    def build(self, name: str, context: BuildContext) -> Adapter:
        return PromptTuning(self, name, _initial_prompt(self, context), None, context)

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        # The beginning does not matter at inference, and PEFT would want a tokenizer for TEXT.
        entries = {"num_virtual_tokens": self.num_virtual_tokens, "prompt_tuning_init": "RANDOM"}
        return {**super().to_peft(architecture), **entries}

    @classmethod
    def from_peft(cls, entries: dict[str, object], keys: list[str]) -> MethodConfig:
        how = {"prompt_tuning_init", "prompt_tuning_init_text"}
        return super().from_peft({k: v for k, v in entries.items() if k not in how}, keys)


class VirtualTokens(Adapter):
    """An adapter whose rows stand in the text, before it, before its answer or at its slots."""

    position: Position

    def places(self, length: int, answer: int | None, slots: Sequence[int]) -> Sequence[Run]:
        """The places of the virtual tokens in a sequence; see ``Adapter.places``.

        Slots get equal numbers of them, and the first ones take one more each if there is a rest.

        Raises:
            UserError: The sequence has no answer, or no slots, or more slots than there are virtual tokens.
        """
        count = self.num_virtual_tokens
        if self.position == "before":
            return ((0, count),)
        if self.position == "after":
            if answer is None:
                raise UserError(
                    "virtual_position is 'after', but a text has no answer that the virtual tokens could stand before. "
                    "Train on conversations or instructions, or take virtual_position: before."
                )
            return ((answer, count),)
        if not slots:
            raise UserError(
                "virtual_position is 'slots', but a text has no slot. Write <|soft|> where virtual tokens shall stand, "
                "in the chat_template or in the text, or take virtual_position: before."
            )
        if count < len(slots):
            raise UserError(
                f"a text has {len(slots)} slots for {count} virtual tokens; each slot takes one or more. Raise "
                "num_virtual_tokens, or write fewer <|soft|>."
            )
        share, more = divmod(count, len(slots))
        return tuple((place, share + (index < more)) for index, place in enumerate(slots))


class PromptTuning(EncodedRows, VirtualTokens):
    """The learned rows, and their place."""

    def __init__(
        self, config: SoftPromptConfig, name: str, rows: Tensor, encoder: RowEncoder | None, context: BuildContext
    ) -> None:
        super().__init__(config, name, rows, encoder, context)
        self.num_virtual_tokens = len(rows)
        self.position = config.virtual_position

    def virtual_tokens(self, seed: int | None = None) -> Tensor:
        return self.values(seed)


def embedded(ids: Tensor, context: BuildContext) -> Tensor:
    """The base's own embeddings [n, d] of token ids, scaled as the base scales them."""
    table = input_embeddings(context.model)
    with torch.no_grad():
        return table(ids.to(table.weight.device))


def embedding_width(context: BuildContext) -> int:
    """The width of the base's embeddings."""
    return input_embeddings(context.model).weight.shape[1]


def _initial_prompt(config: PromptTuningConfig, context: BuildContext) -> Tensor:
    n, width = config.num_virtual_tokens, embedding_width(context)
    if context.blank:
        return context.zeros(n, width)
    if config.prompt_tuning_init == "RANDOM":
        std = embedded(torch.arange(input_embeddings(context.model).weight.shape[0]), context).float().std()
        return context.normal(n, width, std=float(std))
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return embedded(sampled_ids(n, context), context)
    assert config.prompt_tuning_init_text is not None
    ids = text_ids(config.prompt_tuning_init_text, "prompt_tuning_init TEXT", context)
    return embedded(repeated(ids, n), context)
