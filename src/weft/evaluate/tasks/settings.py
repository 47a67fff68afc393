"""A task as its YAML file says it: every key with its meaning, none beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator

from weft.complaints import Worded
from weft.data.reading.texts import TextUnit
from weft.errors import UserError, check_word
from weft.evaluate.metrics import METRICS, Metric
from weft.evaluate.results import TaskKind
from weft.foreign import read_yaml
from weft.patterns import pattern

# Every kind asks for these; the others have no meaning in it.
_OF_KIND: Mapping[TaskKind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "multiple_choice": (("prompt", "choices", "reference"), ("turns", "stop", "extract", "text", "text_unit")),
    "generation": ((), ("choices", "different_counts", "text", "text_unit")),
    "perplexity": (
        (), ("prompt", "choices", "different_counts", "reference", "turns", "stop", "extract", "few_shot", "system",
             "instruction", "apply_chat_template"),
    ),
    "classification": (
        (), ("prompt", "choices", "different_counts", "turns", "stop", "extract", "few_shot", "system", "instruction",
             "apply_chat_template", "text", "text_unit"),
    ),
}  # fmt: skip


class FewShot(Worded):
    """The examples that stand before each question."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(0, ge=0, description="how many")
    data: str | None = Field(
        None, description="a file, or a pattern of files in the task's folder; `same`: the task's own questions"
    )
    pick: Literal["first", "random"] = Field("first", description="which ones: the first, or others for each question")
    delimiter: str = Field("\n\n", description="what stands between two of them; a chat template has turns instead")


class Extraction(Worded):
    """How an answer is taken out of a text: by an expression."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    regex: str = Field(description="the expression; its first group that matched is the answer, or else all of it")
    take: Literal["first", "last"] = Field("first", description="which match")

    def model_post_init(self, _: object) -> None:
        pattern(self.regex, "extract: regex")


Extract = Literal["whole", "first_line", "last_number", "json"] | Extraction


class MetricEntry(Worded):
    """One metric of a task; other keys are the metric's own settings."""

    model_config = ConfigDict(frozen=True, extra="allow", arbitrary_types_allowed=True)

    metric: str = Field(description="its name")
    name: str | None = Field(None, description="what its figure is called (default: as the metric)")
    extract: Extract | None = Field(None, description="how the answer is taken out, if otherwise than the task says")

    @property
    def called(self) -> str:
        """What its figure is called."""
        return self.name or self.metric

    def made(self, where: str) -> Metric:
        """The metric with its settings.

        Raises:
            UserError: There is none of this name, or a setting of it cannot be taken.
        """
        check_word(f"{where}: metric", self.metric, list(METRICS))
        cls = METRICS[self.metric]
        return cls.read(dict(self.model_extra or {}), f"{where}: {self.metric}")


class TaskSettings(Worded):
    """A task. Templates are Jinja, in which the fields of a record are variables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="what the task is called")
    kind: TaskKind = Field(description="what it asks for: a choice by likelihood, a text, a loss, a class")
    description: str = Field("", description="a sentence on it, for people")
    data: str | None = Field(None, description="its records: a path from the folder of this file; --data wins over it")
    files: str | None = Field(None, description="of a folder or zip of data, the pattern of the files to ask")
    columns: list[str] | None = Field(None, description="the names of a table's columns, if the table has no header")
    group: str | None = Field(None, description="template of a question's group, from which its examples come, too")
    system: str | None = Field(None, description="template of a system message; it needs a chat template")
    instruction: str | None = Field(None, description="template of a text before all examples")
    prompt: str | None = Field(None, description="template of the question")
    turns: str | None = Field(
        None, description="the field with a list of questions, each asked after the answer to the one before"
    )
    choices: str | list[str] | None = Field(
        None, description="templates of the choices, or the name of the field that holds a list of them"
    )
    different_counts: bool = Field(False, description="whether questions may have different numbers of choices")
    reference: str | list[str] | None = Field(
        None,
        description="template of the right answer, or several; of a choice its text, number from 0 or letter",
    )
    text: str = Field("{{ text }}", description="template of a text whose loss is taken")
    text_unit: TextUnit = Field("paragraph", description="what of a file of text is one record")
    few_shot: FewShot = Field(FewShot(), description="the examples before each question")
    target_delimiter: str = Field(" ", description="without chat template, what stands between question and answer")
    apply_chat_template: bool | None = Field(
        None, description="whether prompts go through the chat template (default: generation does, choices do not)"
    )
    stop: list[str] = Field([], description="texts that end an answer")
    max_new_tokens: int = Field(256, ge=1, description="the longest answer")
    extract: Extract = Field("whole", description="how the answer is taken out of what was written")
    metrics: list[MetricEntry] = Field(description="the figures; the first counts first")

    @field_validator("metrics")
    @classmethod
    def _some(cls, value: list[MetricEntry]) -> list[MetricEntry]:
        if not value:
            raise ValueError("metrics: name at least one.")
        return value

    @property
    def chat(self) -> bool:
        """Whether prompts go through the chat template."""
        return self.kind == "generation" if self.apply_chat_template is None else self.apply_chat_template

    @classmethod
    def load(cls, path: Path) -> Self:
        """The task of a YAML file.

        Raises:
            UserError: It cannot be read; a key, a word or a metric is not known; a key does not fit the kind.
        """
        values = read_yaml(path)
        if not isinstance(values, dict):
            raise UserError(f"{path} must hold 'key: value' lines, such as `kind: generation` (docs/evaluation.md).")
        return cls.given(values, str(path))

    @classmethod
    def given(cls, values: Mapping[str, Any], where: str) -> Self:
        """The task of these settings, which stand at ``where``.

        Raises:
            UserError: As ``load``.
        """
        found = dict(values)
        if isinstance(found.get("few_shot"), Mapping):
            found["few_shot"] = FewShot.read(found["few_shot"], f"{where}: few_shot")
        if isinstance(found.get("extract"), Mapping):
            found["extract"] = Extraction.read(found["extract"], f"{where}: extract")
        if isinstance(found.get("metrics"), list):
            found["metrics"] = [_entry(one, f"{where}: metrics") for one in found["metrics"]]
        made = cls.read(found, where)
        made._check(where)
        return made

    def _check(self, where: str) -> None:
        needed, idle = _OF_KIND[self.kind]
        for key in needed:
            if getattr(self, key) is None:
                raise UserError(f"{where}: '{key}' is missing; a task of kind {self.kind} needs it.")
        for key in idle:
            if key in self.model_fields_set:
                raise UserError(f"{where}: '{key}' means nothing in a task of kind {self.kind}. Leave it out.")
        if self.kind == "generation" and (self.prompt is None) == (self.turns is None):
            raise UserError(f"{where}: a task of kind generation has either 'prompt' or 'turns'.")
        if self.turns is not None and self.few_shot.count:
            raise UserError(f"{where}: 'turns' and examples before them (few_shot) exclude each other.")
        if self.system is not None and not self.chat:
            raise UserError(f"{where}: 'system' needs apply_chat_template: true. Without a template say 'instruction'.")
        if any(not one for one in self.stop):
            raise UserError(f"{where}: stop: a text that ends an answer cannot be empty.")
        called = [entry.called for entry in self.metrics]
        for entry in self.metrics:
            metric = entry.made(f"{where}: metrics")
            if self.kind not in metric.kinds:
                kinds = ", ".join(sorted(metric.kinds))
                raise UserError(f"{where}: metrics: {entry.metric} is for {kinds}, and this task is {self.kind}.")
            if metric.needs_reference and self.reference is None and self.kind == "generation":
                raise UserError(f"{where}: {entry.metric} compares with 'reference', which is missing.")
            if called.count(entry.called) > 1:
                raise UserError(f"{where}: metrics: '{entry.called}' stands twice; give one of them another name.")
            if self.kind != "generation" and entry.extract is not None:
                raise UserError(f"{where}: metrics: 'extract' is for generation; this task is {self.kind}.")


def _entry(given: object, where: str) -> MetricEntry:
    if isinstance(given, str):
        given = {"metric": given}
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: expected names, or mappings with 'metric'; found {given!r}.")
    found = dict(given)
    if isinstance(found.get("extract"), Mapping):
        found["extract"] = Extraction.read(found["extract"], f"{where}: extract")
    return MetricEntry.read(found, where)
