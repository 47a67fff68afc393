"""The part of an adapter's ``weft.json`` that tells how its data was read, rendered and packed.

An adapter answers as it was trained only if its prompt is rendered as in training. So the text of the template lies in
the folder, beside a hash of the tokenizer and the settings of the data. ``make_renderer`` makes a renderer of it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from weft.data.rendering.fingerprint import tokenizer_hash
from weft.data.rendering.render import Renderer
from weft.data.rendering.served import is_served_form
from weft.data.rendering.templates import PLAIN_TEMPLATE, is_file_name
from weft.data.rendering.tokens import Encoder
from weft.data.sources import weighted_terms
from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = str | dict[str, str]


class TokenizerFacts(BaseModel):
    """Facts of a tokenizer: ``sha256`` tells whether another one is the same, the rest tells how it differs."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sha256: str
    kind: str
    tokens: int
    special_tokens: dict[str, object] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
        """The facts of a tokenizer; its chat template is not among them."""
        return cls(
            sha256=tokenizer_hash(tokenizer),
            kind=type(tokenizer).__name__,
            tokens=len(tokenizer),
            special_tokens={name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        )

    def differences(self, other: TokenizerFacts) -> list[str]:
        """The differences of ``other``, in words; none if it is the same tokenizer."""
        if self.sha256 == other.sha256:
            return []
        said = []
        if self.tokens != other.tokens:
            said.append(f"it has {other.tokens} tokens, not {self.tokens}")
        for name in sorted({*self.special_tokens, *other.special_tokens}):
            mine, theirs = self.special_tokens.get(name), other.special_tokens.get(name)
            if mine != theirs:
                said.append(f"its {name} is {theirs!r}, not {mine!r}")
        return said or ["its vocabulary, its merges or its rules differ"]


class Provenance(BaseModel):
    """The section ``data`` of an adapter's ``weft.json``. What is None is not known.

    Attributes:
        chat_template: the template of conversations (a mapping: the tokenizer's templates by name).
        template_from: where the template came from; "plain": Weft's plain headings, for there was no other.
        settings: the configuration's keys about data; a file on a disk is given by its name only.
        sha256: the hash of the tokenised training and evaluation data, in order.
        batch_tokens: the tokens that filled a batch; None: a batch held ``batch_size`` records.
        parents: what the parents of a combined adapter were trained on.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    chat_template: Template | None = None
    template_from: Literal["tokenizer", "configuration", "plain"] | None = None
    template_kwargs: dict[str, object] | None = None
    tokenizer: TokenizerFacts | None = None
    task: str | None = None
    settings: dict[str, object] | None = None
    sha256: str | None = None
    records: int | None = None
    eval_records: int | None = None
    batch_size: int | None = None
    batch_tokens: int | None = None
    parents: tuple[dict[str, object], ...] = ()

    @model_validator(mode="after")
    def _has_its_template(self) -> Provenance:
        if self.template_from is not None and self.chat_template is None:
            raise ValueError("template_from without a chat_template")
        if self.template_from in ("configuration", "plain") and not isinstance(self.chat_template, str):
            raise ValueError(f"template_from is {self.template_from}, but chat_template is no text")
        if isinstance(self.chat_template, str) and is_file_name(self.chat_template):
            raise ValueError("chat_template names a file, and the text itself must stand there")
        return self

    @classmethod
    def read(cls, section: Mapping[str, object] | None, where: str) -> Provenance | None:
        """The provenance in a section of a folder's file; None without a section.

        Raises:
            UserError: The section is damaged.
        """
        if section is None:
            return None
        try:
            return cls.model_validate(section)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, ("data", *first["loc"])))
            raise UserError(f"{where}: {place}: {first['msg']}. Delete the section data to load without it.") from None


def template_of(renderer: Renderer) -> dict[str, Any]:
    """The three fields of ``Provenance`` about the template."""
    own = renderer.tokenizer.chat_template
    given = renderer.chat_template
    if given is None:
        found: Template | None = own
        origin = "tokenizer"
    else:
        found, origin = given, "plain" if not own and given == PLAIN_TEMPLATE else "configuration"
    return {"chat_template": found, "template_from": origin, "template_kwargs": dict(renderer.settings.template_kwargs)}


def make_renderer(
    record: Provenance | None, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> tuple[Renderer, list[str]]:
    """A renderer as in training, and what the user should know about it.

    Args:
        record: what the adapter's folder says; None: it says nothing.
        tokenizer: the tokenizer of the renderer. Its template may be replaced.
        chat_template: the template that the user asks for instead.
    """
    if record is None:
        return Renderer(tokenizer, chat_template=chat_template), []
    notes = []
    found = record.tokenizer.differences(TokenizerFacts.of(tokenizer)) if record.tokenizer is not None else []
    if found:
        notes.append(f"warning: the tokenizer is not the one of training: {'; '.join(found)}. Prompts may be other "
                     "tokens than those that the adapter learned to answer.")  # fmt: skip
    kwargs, trained = record.template_kwargs, record.chat_template
    if chat_template is not None:
        renderer = Renderer(tokenizer, chat_template=chat_template, template_kwargs=kwargs)
        if trained is not None and renderer.chat_template != trained:
            notes.append("warning: the chat template given is not the one of training; the one given is used.")
        return renderer, notes
    if record.template_from is None:
        if record.parents:
            notes.append("warning: the adapters that this one was made of were trained with different chat templates; "
                         "the tokenizer's own is used.")  # fmt: skip
        return Renderer(tokenizer, template_kwargs=kwargs), notes
    if record.template_from == "configuration" or (record.template_from == "plain" and trained != PLAIN_TEMPLATE):
        assert isinstance(trained, str)
        return Renderer(tokenizer, chat_template=trained, template_kwargs=kwargs), notes
    # Without a template an encoder-decoder renders otherwise than with the plain one, so "plain" sets none.
    wanted = None if record.template_from == "plain" else trained
    if (tokenizer.chat_template or None) != wanted:
        # `weft merge` gives a tokenizer a form of training's template, for other tools to read.
        if not is_served_form(tokenizer.chat_template, trained, Encoder(tokenizer), kwargs or {}):
            notes.append("warning: the tokenizer's chat template is not the one of training; training's is used.")
        tokenizer.chat_template = wanted
    return Renderer(tokenizer, template_kwargs=kwargs), notes


def common(records: Mapping[str, Provenance | None]) -> tuple[Provenance | None, list[str]]:
    """What the adapters of a combination have in common, and lines about what differs."""
    unknown = [name for name, record in records.items() if record is None]
    known = {name: record for name, record in records.items() if record is not None}
    if unknown:
        return None, [f"{', '.join(unknown)}: the folder does not say how its data was rendered"] if known else []
    if not known:
        return None, []
    kept: dict[str, Any] = {}
    differing = []
    for key in Provenance.model_fields:
        values = [getattr(record, key) for record in known.values()]
        if key == "settings":
            kept[key], names = _common_settings([value or {} for value in values])
            differing += names
        elif key != "parents":
            kept[key] = values[0] if all(value == values[0] for value in values) else None
            differing += [key] * (kept[key] is None and any(value is not None for value in values))
    if "chat_template" in differing:
        kept["template_from"] = None
    kept["parents"] = tuple(_parent(name, record) for name, record in known.items())
    shown = [_shown(key, known) for key in differing if key not in ("sha256", "records", "eval_records")]
    return Provenance(**kept), shown


def file_names(value: object) -> Any:
    """Settings as others may see them: a file on this disk is given by its name only."""
    if isinstance(value, Mapping):
        return {key: file_names(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [file_names(item) for item in value]
    if isinstance(value, str) and len(terms := weighted_terms(value)) > 1:
        return " + ".join(f"{weight}*{file_names(path)}" if weight else file_names(path) for weight, path in terms)
    if isinstance(value, str) and len(value) < 4096 and (Path(value).is_absolute() or value.startswith(("~", "."))):
        return Path(value).name
    return value


def _common_settings(values: Sequence[Mapping[str, object]]) -> tuple[dict[str, object], list[str]]:
    keys = dict.fromkeys(key for settings in values for key in settings)
    same = {key: values[0].get(key) for key in keys if all(s.get(key) == values[0].get(key) for s in values)}
    return same, [f"settings.{key}" for key in keys if key not in same]


def _parent(name: str, record: Provenance) -> dict[str, object]:
    settings = record.settings or {}
    mine = {"data": settings.get("data"), "sha256": record.sha256, "records": record.records}
    return {"adapter": Path(name).name, **mine, **({"parents": list(record.parents)} if record.parents else {})}


def _shown(key: str, records: Mapping[str, Provenance]) -> str:
    """A line about a key that differs. Templates and tokenizers are too long to show."""
    if key in ("chat_template", "tokenizer"):
        return f"{key} is not the same for all"
    name = key.removeprefix("settings.")
    values = {n: (r.settings or {}).get(name) if name != key else getattr(r, key) for n, r in records.items()}
    return f"{name}: " + ", ".join(f"{value!r} ({Path(n).name})" for n, value in values.items())
