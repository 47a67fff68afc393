"""The keys of a configuration that say which data is read, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from weft.data.rendering.templates import is_file_name, template_text
from weft.data.sources import parse_sources
from weft.models.hub import Hub


def checked_paths(data: object) -> object:
    """``data`` as it stands, if ``parse_sources`` can read it. Raises UserError."""
    if data is not None:
        parse_sources(data)
    return data


# One path, or several with their shares; see ``weft.data.sources``.
DataPaths = str | list[str | dict[str, Any]]


class DataSettings(BaseModel):
    """Everything that decides which tokens are seen and learned; docs/data.md tells what each key does."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: DataPaths
    data_hub: Hub | None = None
    eval_data: DataPaths | None = None
    eval_size: int = Field(default=0, ge=0)
    eval_split: float | None = Field(default=None, gt=0, lt=1)
    data_format: str | None = None
    columns: dict[str, str] | None = None
    limit: int | None = Field(default=None, gt=0)
    empty_answers: Literal["error", "skip"] = "error"
    on_bad_record: Literal["error", "skip", "report"] = "error"
    bad_records_file: str | None = None
    data_workers: int = Field(default=0, ge=0)
    chat_template: str | None = None
    allow_unknown_markers: bool = False
    template_kwargs: dict[str, Any] = {}
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    max_length: int | None = Field(default=None, gt=1)
    truncation: Literal["refuse", "drop", "left", "right", "middle"] = "refuse"
    documents: Literal["separate", "windows", "joined"] = "separate"
    window_overlap: int = Field(default=1, ge=0)
    audit: Literal["error", "warn", "off"] = "error"

    _paths = field_validator("data", "eval_data", mode="before")(checked_paths)

    @field_validator("chat_template")
    @classmethod
    def _text_of_a_file(cls, value: str | None) -> str | None:
        """A file's text and not its name: the run is to render alike when the file has moved or changed."""
        return value if value is None or not is_file_name(value) else template_text(value).text

    @model_validator(mode="before")
    @classmethod
    def _older_words(cls, values: object) -> object:
        """Read the settings of older runs, which had no ``truncation``."""
        if isinstance(values, Mapping) and isinstance(values.get("truncate"), bool):
            values = dict(values)
            if values.pop("truncate"):
                values.setdefault("truncation", "right")
        return values
