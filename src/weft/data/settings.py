"""The keys of a configuration that say which data is read, and what becomes of it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from weft.models.hub import Hub


class DataSettings(BaseModel):
    """Everything that decides which tokens are seen and learned; docs/data.md tells what each key does."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str
    data_hub: Hub | None = None
    eval_data: str | None = None
    eval_size: int = Field(default=0, ge=0)
    data_format: str | None = None
    columns: dict[str, str] | None = None
    limit: int | None = Field(default=None, gt=0)
    empty_answers: Literal["error", "skip"] = "error"
    chat_template: str | None = None
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    max_length: int | None = Field(default=None, gt=1)
    truncate: bool = False
    audit: Literal["error", "warn", "off"] = "error"
