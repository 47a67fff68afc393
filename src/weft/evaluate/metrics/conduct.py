"""Conduct in a domain: whether an answer refuses, is supported by its context, keeps a style."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from pydantic import Field

from weft.evaluate import behaviour
from weft.evaluate.behaviour import Form, Style, Unit
from weft.evaluate.metrics.base import Metric, Reply


class _Conduct(Metric):
    """One of ``weft.evaluate.behaviour.METRICS``."""

    function: ClassVar[behaviour.Metric]
    context_field: str = Field("context", description="the field of a record that holds the text to answer from")

    def score(self, reply: Reply) -> float:
        context = reply.fields.get(self.context_field)
        reference = next(iter(reply.references), "")
        return type(self).function(reply.text or "", reference, context if isinstance(context, str) else "")


class Refuses(_Conduct):
    """The share of answers that refuse."""

    needs_reference = False
    function = staticmethod(behaviour.refusal)


class RefusesRightly(_Conduct):
    """1 for an answer that refuses where the reference does, and answers where that answers."""

    function = staticmethod(behaviour.refusal_right)


class SaysNotInText(_Conduct):
    """The share of answers that say that the text does not hold it."""

    needs_reference = False
    function = staticmethod(behaviour.not_in_text)


class SaysNotInTextRightly(_Conduct):
    """1 for an answer that says so where the reference does, and nowhere else."""

    function = staticmethod(behaviour.not_in_text_right)


class Supported(_Conduct):
    """The share of an answer's words that stand in its context (``context_field``)."""

    needs_reference = False
    function = staticmethod(behaviour.supported)


class NumbersSupported(_Conduct):
    """The share of an answer's numbers that stand in its context."""

    needs_reference = False
    function = staticmethod(behaviour.numbers_supported)


class KeepsStyle(Metric):
    """1 for an answer that keeps all that is asked of its form: length, form, words."""

    needs_reference = False
    min_length: int | None = Field(None, ge=0, description="the shortest answer, in units")
    max_length: int | None = Field(None, ge=0, description="the longest answer, in units")
    unit: Unit = Field("words", description="of both; a Chinese character is a word")
    form: Form | None = Field(None, description="what the whole answer is")
    pattern: str | None = Field(None, description="an expression that must be found")
    forbidden: list[str] = Field([], description="words that must not stand in it")
    required: list[str] = Field([], description="words that must")

    @cached_property
    def style(self) -> Style:
        """What is asked for."""
        return Style(**self.model_dump())

    def model_post_init(self, _: object) -> None:
        Style(**self.model_dump())  # a wrong one is refused when the task is read

    def score(self, reply: Reply) -> float:
        return self.style.scores(reply.text or "")["style"]
