"""Chat templates by name, and the choice of the template that a configuration means.

The files under ``chat_templates`` were written for Weft after descriptions of the formats. Like any template they run
only in ``weft.data.rendering.sandbox``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from weft.errors import UserError, nearest
from weft.foreign import read_text
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.data.rendering.tokens import Encoder

_FOLDER = Path(__file__).parent / "chat_templates"
_SUFFIXES = (".jinja", ".jinja2", ".j2")


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """A template of Weft. Its ``markers`` must be tokens of the tokenizer.

    ``system``: it takes a system message (those that refuse one say so). ``tools``: it renders tools and calls.
    """

    name: str
    markers: tuple[str, ...] = ()
    system: bool = True
    tools: bool = False

    @property
    def text(self) -> str:
        """The Jinja text."""
        return _read(self.name)


_IM = ("<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

TEMPLATES: dict[str, NamedTemplate] = {
    template.name: template
    for template in (
        NamedTemplate("alpaca", tools=True),
        NamedTemplate("chatglm2"),
        NamedTemplate("chatglm3", ("[gMASK]", "sop", *_ROLES)),
        NamedTemplate("chatml", _IM),
        NamedTemplate(
            "deepseek", ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
        ),
        NamedTemplate("gemma", _GEMMA, system=False),
        NamedTemplate("gemma-3", _GEMMA),
        NamedTemplate("glm-4", ("[gMASK]", "<sop>", *_ROLES)),
        NamedTemplate("llama-2"),
        NamedTemplate("llama-3", _LLAMA3),
        NamedTemplate("llama-3.1", _LLAMA3, tools=True),
        NamedTemplate("minimind", _IM, tools=True),
        NamedTemplate("mistral", ("[INST]", "[/INST]"), tools=True),
        NamedTemplate("mistral-v1"),
        NamedTemplate("phi-3", (*_ROLES, "<|end|>")),
        NamedTemplate("phi-4", (*_IM, "<|im_sep|>")),
        NamedTemplate("qwen2", _IM),
        NamedTemplate("qwen2.5", _IM, tools=True),
        NamedTemplate("qwen3", _IM, tools=True),
        NamedTemplate("vicuna"),
        NamedTemplate("zephyr"),
    )
}
# Other names, some from other tools. Case, `_` and `-` make no difference.
ALIASES = {
    "plain": "alpaca",
    "chatglm": "chatglm3",
    "glm4": "glm-4",
    "im": "chatml",
    "yi": "chatml",
    "llama2": "llama-2",
    "llama3": "llama-3",
    "llama3.1": "llama-3.1",
    "llama3.2": "llama-3.1",
    "llama3.3": "llama-3.1",
    "mistral-v3": "mistral",
    "gemma2": "gemma",
    "gemma3": "gemma-3",
    "qwen": "qwen2",
    "deepseek-v3": "deepseek",
    "deepseek3": "deepseek",
    "phi": "phi-3",
    "phi3": "phi-3",
    "phi4": "phi-4",
}


@dataclass(frozen=True, slots=True)
class Template:
    """The chat template in use: its name ("" for a text or a file of the user), and its text.

    ``origin``: the user "asked" for it, it is the tokenizer's "own", or the "fallback" for a tokenizer without one.
    """

    name: str
    text: str
    origin: Literal["asked", "own", "fallback"] = "asked"


class TemplateSettings(BaseModel):
    """The keys about the chat template."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    chat_template: str | None = Field(
        None, description="a name ([data.md](data.md)), a `.jinja` file or Jinja text, instead of the tokenizer's own"
    )
    allow_unknown_markers: bool = Field(
        False, description="take a named template although the tokenizer has no tokens for its markers"
    )
    template_kwargs: dict[str, Any] = Field(
        {}, description="variables for the chat template, such as `{enable_thinking: false}`"
    )

    @field_validator("chat_template")
    @classmethod
    def _text_of_a_file(cls, value: str | None) -> str | None:
        """The text of a file instead of its name: the run must render alike when the file has moved or changed."""
        return value if value is None or not is_file_name(value) else template_text(value).text


def find_template(settings: TemplateSettings, encoder: Encoder) -> Template:
    """The template that ``chat_template`` means: a name, a ``.jinja`` file, Jinja text, or None for the tokenizer's
    own.

    Raises:
        UserError: The name is unknown, the file cannot be read, or the markers of a named template are no tokens of the
            tokenizer. (``allow_unknown_markers`` lets them be tokenised like other text.)
    """
    wanted = settings.chat_template
    if wanted is None:
        own = encoder.tokenizer.chat_template
        if not own:
            return Template("alpaca", PLAIN_TEMPLATE, "fallback")
        # A tokenizer may have several by name. Transformers chooses among them, so this text only identifies them.
        text = own if isinstance(own, str) else json.dumps(own, ensure_ascii=False, sort_keys=True)
        return Template("", text, "own")
    template = template_text(wanted)
    named = TEMPLATES.get(template.name)
    if named is not None and not settings.allow_unknown_markers:
        missing = [marker for marker in named.markers if not encoder.spells(marker)]
        if missing:
            raise UserError(
                f"chat_template: '{wanted}' marks turns with {', '.join(missing)}, which the tokenizer has no token "
                f"for: each would be split into ordinary pieces. Take a template without such tokens "
                f"({', '.join(name for name, one in TEMPLATES.items() if not one.markers)}), another tokenizer, or set "
                "`allow_unknown_markers: true` to train on the pieces."
            )
    return template


def template_text(wanted: str) -> Template:
    """The template that ``wanted`` names (a name, a ``.jinja`` file, or Jinja text), for any tokenizer.

    Raises:
        UserError: The file cannot be read, or there is no such template.
    """
    if _is_jinja(wanted):
        return Template("", wanted)
    if is_file_name(wanted):
        try:
            return Template("", read_text(local_path(wanted)))
        except UserError as error:
            raise UserError(f"chat_template: {wanted} cannot be read: {error} Give a UTF-8 file.") from None
    names = {_key(alias): target for alias, target in [*ALIASES.items(), *((n, n) for n in TEMPLATES)]}
    name = names.get(_key(wanted), "")
    if not name:
        wanted = wanted[:80]
        raise UserError(
            f"chat_template: there is no template '{wanted}'.{nearest(wanted, [*TEMPLATES, *ALIASES])} Give one of "
            f"{', '.join(TEMPLATES)}, a file ({', '.join(_SUFFIXES)}), or Jinja text."
        )
    return Template(name, TEMPLATES[name].text)


def is_file_name(wanted: str) -> bool:
    """Whether a ``chat_template`` means a file."""
    return wanted.endswith(_SUFFIXES) and not _is_jinja(wanted)


def _is_jinja(wanted: str) -> bool:
    return any(mark in wanted for mark in ("{{", "{%", "{#"))


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "").replace("-", "")


@cache
def _read(name: str) -> str:
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


# For tokenizers without a template of their own: Alpaca's headings, extended to several turns, tools and results.
PLAIN_TEMPLATE = _read("alpaca")
