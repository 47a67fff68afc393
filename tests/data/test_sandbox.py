"""Chat templates of strangers: the ordinary ones give transformers' text, the others are stopped early and cheaply."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tests.conftest import make_tokenizer
from tests.hostile.memory import Memory

from weft.data.rendering import budget
from weft.data.rendering.sandbox import render_chat, render_template
from weft.data.rendering.templates import TEMPLATES
from weft.errors import UserError

TURNS = [
    {"role": "user", "content": "What is in the box?"},
    {"role": "assistant", "content": "Three <b>apples</b> & a 'pear'.", "reasoning_content": None},
    {"role": "user", "content": "And on the table? 桌子上呢？\n\n  - a list"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look somewhere.",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}},
    },
}
GROW = "{% set ns = namespace(x='x', l=['x'], n=2) %}"
# Each makes text, values, numbers or work without end; `y` is a text of 60,000 characters.
BOMBS = {
    "product of text": "{{ 'x' * 10**9 }}",
    "product of text, turned": "{{ 10**9 * 'x' }}",
    "product of a list": "{{ [0] * 10**9 }}",
    "product of products": "{% set a = 'x' * 99999 %}{{ a * 99999 }}",
    "tower": "{{ 9**(9**9) }}",
    "tower in a set": "{% set x = 9**(9**9) %}",
    "tower in a test": "{% if 9**(9**9) > 1 %}a{% endif %}",
    "large product": GROW + "{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested ranges, three": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9) %}{{ c }}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "filtered ranges": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "range": "{{ range(10**9) | list }}",
    "doubling by plus": GROW + "{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by tilde": GROW + "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by join": GROW + "{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling by str.join": GROW + "{% for i in range(99) %}{% set ns.x = ''.join([ns.x, ns.x]) %}{% endfor %}",
    "doubling by percent": GROW + "{% for i in range(99) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubling by format": GROW + "{% for i in range(99) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "doubling by the filter": GROW
    + "{% for i in range(99) %}{% set ns.x = '%s%s' | format(ns.x, ns.x) %}{% endfor %}",
    "doubling by a block": GROW + "{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "doubling by replace": GROW + "{% for i in range(99) %}{% set ns.x = ns.x | replace('x', 'xx') %}{% endfor %}",
    "doubling by str.replace": GROW + "{% for i in range(99) %}{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}",
    "doubling lists": GROW + "{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "nested lists": GROW + "{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "nested tuples": GROW + "{% for i in range(99) %}{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ ns.l == ns.l }}",
    "nested objects": GROW
    + "{% for i in range(99) %}{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l|tojson }}",
    "nested by product": GROW + "{% for i in range(99) %}{% set ns.l = [ns.l] * 2 %}{% endfor %}{{ ns.l | tojson }}",
    "nested by dict()": GROW + "{% for i in range(99) %}{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}",
    "many long strings": GROW + "{% for i in range(99999) %}{% set ns.l = ns.l + [y ~ i] %}{% endfor %}",
    "many slices": GROW + "{% for i in range(99999) %}{% set ns.l = ns.l + [y[i % 9:]] %}{% endfor %}",
    "text as a list": "{% for i in range(99999) %}{% set a = y | list %}{% endfor %}",
    "map of centers": "{{ range(99999) | map('string') | map('center', 90000) | list | length }}",
    "center": "{{ 'x' | center(10**9) }}",
    "center, constant": "{{ 'x' | center(1000000000) }}",
    "str.center": "{{ 'x'.center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "expandtabs": "{{ ('\\t' * 60000).expandtabs(60000) }}",
    "format with a width": "{{ '%1000000000d' % 1 }}",
    "format with a precision": "{{ '%.1000000000f' % 1 }}",
    "format with a star": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "str.format": "{{ '{:>1000000000}'.format('x') }}",
    "str.format, nested": "{{ '{:>{w}}'.format('x', w=1000000000) }}",
    "str.format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "str.format in a filter": "{{ ['x'] | map('attr', 'format') | list }}{{ '{:>1000000000}'.format(1) }}",
    "indent": "{{ ('\\n' * 60000) | indent(60000) }}",
    "indent by text": "{{ ('\\n' * 60000) | indent(y) }}",
    "tojson": "{{ [[[[1]]]] | tojson(indent=1000000000) }}",
    "tojson, separators": "{{ range(60000) | list | tojson(separators=(y, y)) }}",
    "join by text": "{{ range(60000) | join(y) }}",
    "join of a long one": "{% set a = [y] %}{{ (a * 60000) | join }}",
    "list of a long one": "{{ [y] * 60000 }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "sum of lists": "{{ ([[1, 2]] * 60000) | sum(start=[]) | length }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "bytes": "{{ 'x'.encode().center(1000000000) }}",
    "translate": "{{ ('a' * 60000).translate({97: y}) }}",
    "select in": "{{ range(99999) | select('in', range(99999) | list) | list | length }}",
    "in": "{% set l = range(99999) | list %}{% for i in range(99999) %}{% if 'x' in l %}{% endif %}{% endfor %}",
    "equal": "{% set l = range(99999) | list %}{% set m = range(99999) | list %}"
    "{% for i in range(99999) %}{% if l == m %}{% endif %}{% endfor %}",
    "sort": "{% for i in range(99999) %}{% set l = range(99999) | sort(reverse=true) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "recursive loop":
    "{% for a in [[1]] recursive %}{{ loop(a) if a is iterable else loop([[1], [1]]) }}{% endfor %}",
    "caller":
    "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 30 + "x" + "{% endcall %}" * 30,
    "filter block": "{% for i in range(99999) %}{% filter upper %}" + "x" * 9999 + "{% endfilter %}{% endfor %}",
    "data in a macro":
    "{% macro f() %}" + "x" * 9999 + "{% endmacro %}{% for i in range(99999) %}{% set a = f() %}{% endfor %}",
    "output": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "strftime": "{{ strftime_now('%1000000000Y' * 99) }}",
    "deep": "{{ " + "(" * 60000 + "1" + ")" * 60000 + " }}",
    "long sum": "{{ 1" + " + 1" * 30000 + " }}",
    "deep lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "deep ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long": "x" * 10_000_000,
    "digits": "{{ " + "9" * 5000 + " }}",
}  # fmt: skip
# Ways out of jinja's sandbox that have been tried on it.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}{{ ''['__class__'].x }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}{{ (''|attr('__class__')).x }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}{{ joiner.__init__.x.y }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os') }}",
    "{{ namespace.__init__.__globals__['os'].system('id') }}",
    "{{ raise_exception.__globals__.json.codecs.open('/etc/passwd').read() }}",
    "{{ strftime_now.__globals__['nodes'].x }}",
    "{{ '{0.__class__.__mro__}'.format('x').x.y }}{{ '{0.__init__.__globals__}'.format(cycler) }}{{ 1/0 }}",
    "{{ '%s' % ''.__class__.x }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ dict.__class__.x.y }}",
    "{{ dict.fromkeys.__func__.__globals__.x }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
    "{% from '/etc/passwd' import x %}",
    "{{ 'a'|map('__class__')|list }}",
    "{{ [cycler]|map(attribute='__init__.__globals__')|list|first|length }}{{ 1/0 }}",
    "{{ loop.__class__.x }}",
    "{% for a in [1] %}{{ loop._recurse.__globals__.x }}{% endfor %}",
    "{{ (messages|groupby('role'))[0].__class__.x }}",
    "{{ caller.__globals__.x }}",
    "{% macro f() %}{% endmacro %}{{ f._func.__globals__.x }}",
    "{{ f' tick' }}",
    "{{ 1 | ' tick' }}",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_ordinary_templates_give_the_text_of_transformers(
    name: str, generation: bool, tools: Any, tokenizer: Any
) -> None:
    options = {"tools": tools, "chat_template": TEMPLATES[name].text, "add_generation_prompt": generation}
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False, **options)
    assert render_chat(tokenizer, TURNS, **options) == expected


ODD = """{%- set ns = namespace(found=false, last='') -%}
{%- for m in messages if m.role != 'system' -%}{%- set ns.last = ns.last ~ loop.index ~ m['role'][0] -%}
{{- m.content | trim | replace('the', 'a') | upper | tojson(indent=2) }}|{{ '%s-%05d' % (m.role, loop.index) }}|
{{- '{:>8}|{0}'.format(m.role) if false else '{:>8}'.format(m.role) }}{% if loop.previtem is defined %}+{% endif %}
{%- if loop.index is divisibleby 2 %}{% continue %}{% endif %}
{%- generation %}{{ m.content.split(' ')[-1] }}{% endgeneration %}
{%- endfor -%}{{ ns.last }}{{ messages[::-1] | map(attribute='role') | join(', ') }}{{ messages | selectattr('role',
'equalto', 'user') | list | length }}{{ undefined_name }}{{ [1, 'a', none, 2.5, {'k': (1, 2)}] }}{{ 7 // 2 ** 2 % 3 }}
{% macro item(x, y=2) %}<{{ x }}{{ y * '-' }}{{ caller() if caller }}>{% endmacro %}{{ item('a') }}
{%- call item('b', 3) %}in{% endcall %}
{% set block %}{{ messages | length }} turns{% endset %}{{ block | indent(4, true) }}{{ {'a': 1} | dictsort }}
{{ bos_token }}{{ 'user' in messages | map(attribute='role') }}{{ 'x' * 3 + 'y' }}{{ [1] + [2] }}{{ (1, 2) }}
{{ range(3) | batch(2, 0) | list }}
"""


def test_an_odd_template_gives_the_text_of_transformers(tokenizer: Any) -> None:
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False, chat_template=ODD)
    assert render_chat(tokenizer, TURNS, chat_template=ODD) == expected


def _stopped(template: str) -> str:
    variables = {"messages": TURNS, "y": "y" * 60_000}
    with pytest.raises(Exception) as caught:
        render_template(template, variables)
    return str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is the process's own. Asked for are 5 s and 500 MB; a template alone takes less."""
    monkeypatch.setattr(budget, "SECONDS", 0.3)  # of 1.0, for the sake of the suite
    render_template("x", {})  # what the first call of all imports and compiles
    start, memory = time.process_time(), Memory()
    assert _stopped(BOMBS[name])
    assert memory.grown() < 250e6
    assert time.process_time() - start < 3


@pytest.mark.parametrize("template", ESCAPES)
def test_nothing_leads_out(template: str) -> None:
    assert _stopped(template)


def test_what_stops_a_template_is_said() -> None:
    for template, expected in (("{{ 'x' * 10**9 }}", "a string of more than"), (BOMBS["nested ranges"], "loop"),
                               (BOMBS["tower"], "bits"), (BOMBS["center"], "number")):  # fmt: skip
        with pytest.raises(UserError, match=expected):
            render_template(template, {"messages": []})


def test_limits_grow_with_what_is_given() -> None:
    long = [{"role": "user", "content": "x" * 3_000_000}, {"role": "assistant", "content": "y" * 3_000_000}]
    template = "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ m.content %}{% endfor %}"
    template += "{{ ns.t }}"
    assert len(render_template(template, {"messages": long})) == 6_000_000
    many = [{"role": "user", "content": "x" * 50}] * 3000
    last = "loop.index0 == messages | length - 1"
    template = f"{{% for m in messages %}}{{% if {last} %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
    assert render_template(template, {"messages": many}) == "x" * 50
