"""Prompt tuning (Lester et al. 2021): a model that computes ``p(Y | X)`` is asked for ``p(Y | [P; X])`` with learned
embeddings P [n, d]; nothing else is trained. P may also stand right before the answer, or at slots of the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from weft.core.adapter import Adapter, Run
from weft.core.architecture import Architecture
from weft.core.config import BuildContext, MethodConfig
from weft.errors import UserError
from weft.methods.encoder import EncodedRows, RowEncoder, repeated, sampled_ids, text_ids

Position = Literal["before", "after", "slots"]


class SoftPromptConfig(MethodConfig):
    """What the methods with virtual tokens share."""

    harmless_keys: ClassVar[frozenset[str]] = frozenset(
        {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "tokenizer_kwargs",
         "tokenizer_name_or_path"}
    )  # fmt: skip

    not_in_peft: ClassVar[frozenset[str]] = frozenset({"virtual_position"})
    peft_defaults: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": None}

    virtual_position: Position = Field(
        "before",
        description="before the text, `after` the prompt (right before the answer), or at the template's `slots`",
    )

    def in_peft(self) -> dict[str, Any]:
        return {**super().in_peft(), "peft_type": self._stored_type()}

    def _stored_type(self) -> str:
        # PEFT would load the file and put the rows before the text; a type that it does not know, it refuses.
        before = self.virtual_position == "before"
        return self.peft_type if before else f"{self.peft_type}_{self.virtual_position.upper()}"

    def to_peft(self, architecture: Architecture) -> dict[str, Any]:
        entries: dict[str, Any] = {
            "token_dim": architecture.embedding_size or architecture.hidden_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": architecture.num_heads,
            "num_layers": architecture.num_layers,
        }
        if self.virtual_position != "before":
            entries["peft_type"] = self._stored_type()
        return entries


class PromptTuningConfig(SoftPromptConfig):
    """PEFT's names. Unlike PEFT the default initialisation is sampled vocabulary, which the paper found better than
    random."""

    method: ClassVar[str] = "prompt_tuning"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    default_learning_rate: ClassVar[float] = 3e-2
    small_learning_rate: ClassVar[float | None] = 0.2
    not_in_peft: ClassVar[frozenset[str]] = SoftPromptConfig.not_in_peft | {
        "prompt_tuning_init", "prompt_tuning_init_text"
    }  # fmt: skip
    peft_defaults: ClassVar[Mapping[str, Any]] = {**SoftPromptConfig.peft_defaults, "prompt_tuning_init": "RANDOM"}

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

    def to_peft(self, architecture: Architecture) -> dict[str, Any]:
        # How it began does not matter at inference, and PEFT would want a tokenizer for TEXT.
        entries = {"num_virtual_tokens": self.num_virtual_tokens, "prompt_tuning_init": "RANDOM"}
        return {**super().to_peft(architecture), **entries}

    @classmethod
    def from_peft(cls, entries: dict[str, Any], keys: list[str]) -> MethodConfig:
        how = {"prompt_tuning_init", "prompt_tuning_init_text"}
        return super().from_peft({k: v for k, v in entries.items() if k not in how}, keys)


class PromptTuning(EncodedRows):
    """The learned rows, and where they stand."""

    def __init__(
        self, config: SoftPromptConfig, name: str, rows: Tensor, encoder: RowEncoder | None, context: BuildContext
    ) -> None:
        super().__init__(config, name, rows, encoder, context)
        self.num_virtual_tokens = len(rows)
        self.position: Position = config.virtual_position

    def places(self, length: int, answer: int | None, slots: Sequence[int]) -> Sequence[Run]:
        return virtual_places(self.position, self.num_virtual_tokens, answer, slots)

    def virtual_tokens(self, seed: int | None = None) -> Tensor:
        return self.values(seed)


def virtual_places(position: Position, count: int, answer: int | None, slots: Sequence[int]) -> Sequence[Run]:
    """Where ``count`` virtual tokens stand in a sequence; see ``Adapter.places``.

    Over k slots they are spread as evenly as they can be; the first ones take one more where it does not come out even.

    Raises:
        UserError: the sequence has no answer, or no slots, or more slots than there are virtual tokens.
    """
    if position == "before":
        return ((0, count),)
    if position == "after":
        if answer is None:
            raise UserError(
                "virtual_position is 'after', but a text has no answer that the virtual tokens could stand before. "
                "Train on conversations or instructions, or take virtual_position: before."
            )
        return ((answer, count),)
    if not slots:
        raise UserError(
            "virtual_position is 'slots', but a text has no slot. Write <|soft|> where virtual tokens shall stand, in "
            "the chat_template or in the text, or take virtual_position: before."
        )
    if count < len(slots):
        raise UserError(
            f"a text has {len(slots)} slots for {count} virtual tokens; each slot takes one or more. Raise "
            "num_virtual_tokens, or write fewer <|soft|>."
        )
    share, more = divmod(count, len(slots))
    return tuple((place, share + (index < more)) for index, place in enumerate(slots))


def embedded(ids: Tensor, context: BuildContext) -> Tensor:
    """The base's own embeddings [n, d] of token ids, scaled as the base scales them."""
    table: Any = context.model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        return table(ids.to(table.weight.device))


def embedding_width(context: BuildContext) -> int:
    """How wide the base's embeddings are."""
    table: nn.Embedding = context.model.get_input_embeddings()  # type: ignore[operator]
    return table.weight.shape[1]


def _initial_prompt(config: PromptTuningConfig, context: BuildContext) -> Tensor:
    n, width = config.num_virtual_tokens, embedding_width(context)
    if context.blank:
        return context.zeros(n, width)
    if config.prompt_tuning_init == "RANDOM":
        std = embedded(torch.arange(context.model.get_input_embeddings().weight.shape[0]), context).float().std()  # type: ignore[operator]
        return context.normal(n, width, std=float(std))
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return embedded(sampled_ids(n, context), context)
    assert config.prompt_tuning_init_text is not None
    ids = text_ids(config.prompt_tuning_init_text, "prompt_tuning_init TEXT", context)
    return embedded(repeated(ids, n), context)
