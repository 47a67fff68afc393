"""A chat template in Go's language gives the text of the Jinja template, or is refused.

What the interpreter here makes of a template was compared with Go's own text/template on 546 renderings of these
templates; the tests hold some of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tests.kit.tokenizers import FORGETFUL

from weft.data import TEMPLATES, Message
from weft.data.rendering.sandbox import render_template
from weft.data.rendering.served import message_fields
from weft.errors import UserError
from weft.export.go_template import check_go_template, find_gaps, go_template, run_go_template
from weft.export.proof import fixed_texts
from weft.export.rendering import fixed_conversations

CONVERSATIONS = [*fixed_conversations(fixed_texts()), [Message("user", 'a "quoted" {{ .Content }} \\ and\ttab')]]
# Its turns are numbered, which no gap between two roles can say.
NUMBERED = ("chatglm2",)
TRIMMING = ("gemma", "gemma-3", "llama-2", "llama-3", "llama-3.1")


def renders(template: str) -> Callable[[Sequence[Message]], str]:
    def render(messages: Sequence[Message]) -> str:
        shown = {"messages": message_fields(messages), "add_generation_prompt": True, "tools": None,
                 "documents": None, "bos_token": "<s>", "eos_token": "</s>"}  # fmt: skip
        return render_template(template, shown)

    return render


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_named_template(name: str) -> None:
    render = renders(TEMPLATES[name].text)
    if name in NUMBERED:
        with pytest.raises(UserError, match="between the assistant's turn and the user's turn is not always the same"):
            find_gaps(render)
        return
    head = "<s>" if render(CONVERSATIONS[0]).startswith("<s>") else ""
    template = go_template(find_gaps(render), head)
    count, spaces = check_go_template(template, render, CONVERSATIONS, head)
    assert count >= 22
    assert spaces
    _, spaces = check_go_template(template, render, [[Message("user", " a \n")]], head)
    assert spaces == (name not in TRIMMING)


def test_a_template_that_looks_at_more_is_refused() -> None:
    with pytest.raises(UserError, match="is not always the same"):
        find_gaps(renders(FORGETFUL.replace("loop.last", "loop.index == 2")))
    backwards = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="does not write the user's turns once and in order"):
        find_gaps(renders(backwards))
    # Only other conversations than those of the derivation show that it shortens long words.
    shortens = "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('spider', 'fly') }}{% endfor %}<assistant>"
    template = go_template(find_gaps(renders(shortens)))
    with pytest.raises(UserError, match=r"becomes .*spider.* instead of .*fly"):
        check_go_template(template, renders(shortens), CONVERSATIONS, "")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ('a {{- "b" }} c', "ab c"),
        ('a {{ "b" -}} c', "a bc"),
        ('{{ range .Messages }}{{ .Role }}:{{ .Content }};{{ end }}', "user:x;assistant:y;"),
        ('{{ $a := "" }}{{ range .Messages }}{{ if eq $a "user" }}!{{ else if eq $a "" }}?{{ else }}.{{ end }}'
         '{{ $a = .Role }}{{ end }}{{ $a }}', "?!assistant"),
        ('{{ if eq "}}" "{{" }}a{{ else }}{{ "\\"}} \\n" }}{{ end }}', '"}} \n'),
    ],
)  # fmt: skip
def test_the_interpreter(template: str, text: str) -> None:
    """As Go's own text/template gives them."""
    assert run_go_template(template, [Message("user", "x"), Message("assistant", "y")]) == text


@pytest.mark.parametrize("template", ["{{ .Tools }}", "{{ if .Role }}a{{ end }}", '{{ if eq "a" "a" }}', "{{ end }}"])
def test_more_of_the_language_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="the Go template"):
        run_go_template(template, [])
