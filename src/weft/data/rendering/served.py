"""The chat template that makes other tools give the tokens of training.

Transformers' ``apply_chat_template`` runs the template and tokenises its text without special tokens around it. Weft's
renderer does more: it puts the BOS before a text that has none, ends each earlier answer with the EOS, gives the
template its ``template_kwargs``, and leaves out ``SOFT``. So a folder for other tools needs a template that does all
this itself. Which of the forms below does it is found by a trial: the first that gives the tokens of the most
conversations, so a template that writes what it should stays as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from keyword import iskeyword
from typing import TYPE_CHECKING

from weft.data.formats.examples import Message
from weft.data.rendering.render import Renderer, Task
from weft.data.rendering.sandbox import render_chat
from weft.data.rendering.tokens import SOFT, Encoder
from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Callable[[str], str]
_WORDS = ("true", "false", "none")
Stored = str | dict[str, str]  # a tokenizer's template, or its templates by name

# The rules of the renderer, as a template: ``conversation`` is the template of training. An answer that it leaves
# without an EOS gets one after its last letter, if the turns before it are how the whole begins.
_WHOLE = """{%- macro conversation(messages, add_generation_prompt) %}
TEMPLATE{{ '' }}{% endmacro %}
{%- set whole = conversation(messages, add_generation_prompt) %}
{%- set head, tail, end = HEAD, TAIL, END %}
{{- '' if whole.startswith(head) else head + ('' if whole.startswith(' ') else LEAD) }}
{%- set ns = namespace(at=0) %}
{%- for message in messages if end %}
{%- if message.role == 'assistant' and not loop.first %}
{%- set prompt = conversation(messages[:loop.index0], true) %}
{%- set turn = conversation(messages[:loop.index], false) %}
{%- set answer = turn[prompt | length:] %}
{%- if turn.startswith(prompt) and whole.startswith(turn) and end not in answer %}
{%- set stop = (prompt | length) + (answer.rstrip() | length) %}
{{- whole[ns.at:stop] + end }}
{%- set ns.at = stop %}
{%- endif %}
{%- endif %}
{%- endfor %}
{{- whole[ns.at:] + ('' if whole.endswith(tail) else tail) }}"""


def message_fields(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Messages as ``apply_chat_template`` takes them."""
    return [
        {"role": turn.role, "content": turn.content}
        | ({"tool_calls": list(turn.tool_calls)} if turn.tool_calls else {})
        for turn in messages
    ]


def ids_elsewhere(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, object]] = (),
    variables: Mapping[str, object] | None = None,
) -> list[int]:
    """The ids [prompt length] from which another tool generates: ``apply_chat_template``, within Weft's limits.

    Args:
        template: None stands for the tokenizer's own.
        variables: what the tool gives to the template besides.

    Raises:
        UserError: The template reaches a limit.
        Exception: Whatever the template raises.
    """
    text = render_chat(
        tokenizer,
        message_fields(messages),
        tools=tools,
        chat_template=template,
        add_generation_prompt=True,
        **(variables or {}),
    )
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def served_template(renderer: Renderer, task: Task, conversations: Sequence[Sequence[Message]]) -> Stored | None:
    """The template of a renderer, in the form that gives its ids elsewhere for the most of ``conversations``.

    Conversations without an answer count first. Those that the renderer refuses do not count. Where text alone cannot
    give the ids (a tokenizer that merges across the end of a turn), the form that misses the fewest tokens wins.
    """
    stored = renderer.chat_template or renderer.tokenizer.chat_template
    if not stored:
        return None
    text = stored if isinstance(stored, str) else stored.get("default")
    wanted = []
    for messages in conversations:
        try:
            wanted.append((messages, renderer.prompt(messages, task=task).ids))
        except UserError:
            continue
    if text is None or not wanted:
        return stored
    variables = renderer.settings.template_kwargs

    def score(form: Form) -> tuple[int, int, int]:
        template, right, wrong = form(text), [], 0
        for messages, ids in wanted:
            missed = _missed(renderer, template, messages, ids)
            right += [] if missed else [messages]
            wrong += missed
        return sum(map(opening, right)), len(right), -wrong

    return _apply(max(_forms(renderer.encoder, variables), key=score), stored)


def is_served_form(
    stored: Stored | None, trained: Stored | None, encoder: Encoder, variables: Mapping[str, object]
) -> bool:
    """Whether a tokenizer's template is that of training, or one of the forms that ``served_template`` makes of it."""
    if not stored or not trained:
        return not stored and not trained
    return any(_apply(form, trained) == stored for form in _forms(encoder, variables))


def opening(messages: Sequence[Message]) -> bool:
    """Whether a conversation has no answer yet."""
    return all(message.role != "assistant" for message in messages)


def _missed(renderer: Renderer, template: str, messages: Sequence[Message], ids: list[int]) -> int:
    """The number of tokens that a template gives too many or too few; 0 only if its ids are those wanted."""
    try:
        found = ids_elsewhere(renderer.tokenizer, template, messages)
    except Exception:  # a template is a program, and this form of it may fail
        return len(ids)
    if found == ids:
        return 0
    here, there = Counter(ids), Counter(found)
    return max(1, ((here - there) + (there - here)).total())


def _apply(form: Form, stored: Stored) -> Stored:
    return form(stored) if isinstance(stored, str) else {name: form(text) for name, text in stored.items()}


def _forms(encoder: Encoder, variables: Mapping[str, object]) -> Iterator[Form]:
    """The forms in the order in which they are preferred, simple ones first."""
    names = encoder.tokenizer.convert_ids_to_tokens
    bos, head, tail = ("".join(names(ids)) for ids in (encoder.bos, encoder.head, encoder.tail))
    eos = str(encoder.tokenizer.eos_token or "")
    given = "".join(
        f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} %}}\n"
        for name, value in variables.items()
        if name.isidentifier() and not iskeyword(name) and name not in _WORDS  # a template can use no other
    )
    yield lambda text: text
    yield lambda text: given + _bare(text)
    if bos:
        # Without the comment the newline would be written, and blanks before a first tag would be.
        yield (
            lambda text: (
                f"{given}{{{{- {_literal(bos)} }}}}{{# The beginning that training puts here. #}}\n{_bare(text)}"
            )
        )
    for first, last in dict.fromkeys(((bos, ""), (head, tail))):
        for lead in ("", " "):
            for end in dict.fromkeys(("", eos)):
                values = {"HEAD": first, "TAIL": last, "END": end, "LEAD": lead}
                yield partial(_whole, given=given, values=values)


def _whole(text: str, given: str, values: Mapping[str, str]) -> str:
    """``_WHOLE`` with a template and values in it, after the lines ``given``."""
    found = _WHOLE
    for name, value in values.items():
        found = found.replace(name, _literal(value))
    return given + found.replace("TEMPLATE", _bare(text).removesuffix("\n"))


def _bare(text: str) -> str:
    """A template without the places of virtual tokens, which no other tool knows."""
    return text.replace(SOFT, "")


def _literal(value: object) -> str:
    """A value of JSON as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
