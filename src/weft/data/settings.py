"""The keys of a configuration that say which data is read, and what becomes of it.

Each key stands once, with its sentence, its type and its allowed values: here, or beside the code that honours it (the
bases of ``RenderSettings``).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from weft.data.auditing.audit import AuditMode
from weft.data.problems import OnBadRecord
from weft.data.reading.texts import TextUnit
from weft.data.rendering.drafts import RenderSettings
from weft.data.sources import Source, parse_sets, parse_sources, with_paths
from weft.models.hub import Hub
from weft.paths import with_home

EmptyAnswers = Literal["error", "skip"]
# One path, or several with their shares (``weft.data.sources``).
DataPaths = str | list[str | dict[str, object]]
# The same, or several such sets by name.
EvalPaths = DataPaths | dict[str, DataPaths]
# Marks a key that may change when a run is resumed: it changes no result.
FREE = object()
S = TypeVar("S", bound=BaseModel)


def checked_paths(data: Any) -> Any:
    """``data`` with homes in the place of ``~``. Raises UserError if ``parse_sources`` cannot read it."""
    if data is None:
        return None
    parse_sources(data)
    return with_paths(data, with_home)


def checked_sets(data: Any) -> Any:
    """Evaluation data with homes in the place of ``~``. Raises UserError if ``parse_sets`` cannot read it."""
    return with_paths(data, with_home) if parse_sets(data) else None


def free_keys(cls: type[BaseModel]) -> Collection[str]:
    """The keys that are marked ``FREE``."""
    return {key for key, field in cls.model_fields.items() if FREE in field.metadata}


def part(cls: type[S], settings: BaseModel, **changes: Any) -> S:
    """The part of the ``settings`` that belongs to ``cls``, one of their bases, with ``changes``."""
    return cls.model_construct(**{key: getattr(settings, key) for key in cls.model_fields} | changes)


class ReadSettings(BaseModel):
    """The keys that say how the records of a file are read."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data_format: str | None = Field(
        None, description="format of the records, if it should not be recognised ([data.md](data.md))"
    )
    columns: dict[str, str] | None = Field(
        None, description="`{field of the format: field in the data}`; also paths and templates ([data.md](data.md))"
    )
    text_unit: TextUnit | None = Field(
        None,
        description="of files of text, what is learned as one text: the file, a paragraph (blank lines separate them) "
        "or a line; default: of .txt a paragraph, of other files all ([data.md](data.md))",
    )
    limit: int | None = Field(
        None, gt=0, description="read only this many records of each source of `data`; not of `eval_data`"
    )
    empty_answers: EmptyAnswers = Field("error", description="what to do with a record whose answer is empty")
    on_bad_record: OnBadRecord = Field(
        "error",
        description="what to do with any other record that cannot be used: list up to 20 and end; leave out and log "
        "how many; or write all of them to a file as well",
    )
    bad_records_file: Annotated[str | None, FREE] = Field(
        None, description="the file for `on_bad_record: report`; default: `bad_records.jsonl` in the run's folder"
    )
    data_workers: Annotated[int, FREE] = Field(
        0, ge=0, description="processes that render the records; any number gives the same samples"
    )

    @field_validator("bad_records_file")
    @classmethod
    def _home(cls, path: str | None) -> str | None:
        return path and with_home(path)

    def of(self, source: Source, *, evaluated: bool = False) -> ReadSettings:
        """How one source is read: its own keys win. The run's limit is not for what is ``evaluated``."""
        return part(
            ReadSettings,
            self,
            data_format=source.format or self.data_format,
            columns=source.columns or self.columns,
            limit=source.limit or (None if evaluated else self.limit),
        )


class DataSettings(RenderSettings, ReadSettings):
    """Everything that decides which tokens are seen and learned; docs/data.md tells what each key does."""

    data: DataPaths | None = Field(
        None,
        description="training data: a file, a folder, a pattern, a hub's data set (`owner/name`, `owner/name:split`), "
        "a list of them, or `0.7*a.jsonl + 0.3*b.jsonl`; a job may have its own, and if all have it is not needed here "
        "([data.md](data.md))",
    )
    data_hub: Hub | None = Field(None, description="for data sets, if it is another one than `hub`")
    eval_data: EvalPaths | None = Field(
        None,
        description="data to evaluate on; a job may have its own. Several sets by name, `{domain: a.jsonl, general: "
        "[b.jsonl, c.jsonl]}`, have a loss each ([data.md](data.md))",
    )
    eval_size: int = Field(
        0, ge=0, description="without `eval_data`: how many records to hold out, the same for every job"
    )
    eval_split: float | None = Field(
        None, gt=0, lt=1, description="without `eval_data`: the share of the records to hold out, by their content"
    )
    add_tokens: list[str] = Field(
        [],
        description="texts that become one token each; every adapter trains and keeps rows for them in the embeddings "
        "and the head ([data.md](data.md))",
    )
    audit: Annotated[AuditMode, FREE] = Field(
        "error",
        description="what to do before the first step if the rendered data would train wrongly (nothing to learn, an "
        "end that is not learned, two BOS …): refuse, say so, or do not look ([data.md](data.md))",
    )

    _paths = field_validator("data", mode="before")(checked_paths)
    _sets = field_validator("eval_data", mode="before")(checked_sets)

    def unlimited(self) -> Self:
        """The same settings for records of any length: nothing is cut or left out."""
        return self.model_copy(update={"max_length": None, "documents": "separate"})
