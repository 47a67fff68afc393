"""Answers that a grammar allows: a JSON schema, any JSON object, a regular expression, or one of several strings.

llguidance does the work (``weft[constrain]``). JSON is written compactly, with single spaces, or on indented lines,
without ``\\uXXXX`` and ``\\/``. A regular expression has the syntax of Rust's ``regex`` and matches the whole answer.
What cannot be enforced is refused by name, never ignored.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from weft.errors import UserError, reason_of
from weft.foreign import parse_json

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from llguidance._lib import JsonCompileOptions
    from transformers import PreTrainedTokenizerBase

Kind = Literal["json_schema", "json_object", "regex", "choice"]

_LARGEST = 64 << 10  # characters of a grammar; 2,500 properties take 0.6 s
_DEPTH = 64  # of a schema
_KEPT = 64  # grammars, ready for use
_SECONDS = 5.0  # of a look at a schema by another process
# What can make llguidance intersect expressions, or unfold numbers: without end, and nothing can stop it.
_ENDLESS = frozenset({"pattern", "patternProperties", "propertyNames", "format", "multipleOf", "allOf"})
# Free white space lets a model write nothing else for ever. ``\\u0061`` would be another name of the key "a".
_JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_pattern": r"(\n {0,32}| )?",
    "lenient": False,
    "json_allowed_escapes": 'nrbtf"\\',
}
_SIGNS = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")  # what means something in an expression
_LOOK = Path(__file__).with_name("grammar_look.py")


@dataclass(frozen=True)
class Constraint:
    """What an answer must be. ``text`` is the schema as JSON, the expression, or the strings as a JSON list."""

    kind: Kind
    text: str = ""

    @staticmethod
    def json_schema(schema: Mapping[str, object]) -> Constraint:
        """JSON that this schema allows.

        Raises:
            UserError: it is no schema, is too large, or says what cannot be enforced (as far as that is seen at once).
        """
        if not isinstance(schema, Mapping):
            raise UserError(f"json_schema is {type(schema).__name__}; expected a schema, as an object.")
        _check_schema(schema)
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"json_schema is no JSON: {reason_of(error)}.") from None
        return Constraint("json_schema", _checked("json_schema", text))

    @staticmethod
    def json_object() -> Constraint:
        """Any JSON object."""
        return Constraint("json_object")

    @staticmethod
    def regex(pattern: str) -> Constraint:
        """Text that the expression matches as a whole.

        Raises:
            UserError: it is no string or too long.
        """
        if not isinstance(pattern, str):
            raise UserError(f"regex is {type(pattern).__name__}; expected a string.")
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
            raise UserError(f"regex {pattern[-40:]!r} ends with a lone backslash.")
        return Constraint("regex", _checked("regex", pattern))

    @staticmethod
    def choice(choices: Sequence[str]) -> Constraint:
        """One of these strings.

        Raises:
            UserError: there is none, one is empty or no string, or they are too long together.
        """
        if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
            raise UserError("choice expects a list of strings, at least one.")
        for one in choices:
            if not isinstance(one, str) or not one:
                raise UserError(f"choice has {one!r}; expected strings that are not empty.")
        return Constraint("choice", _checked("choice", json.dumps(list(choices), ensure_ascii=False)))


def _checked(kind: str, text: str) -> str:
    if len(text) > _LARGEST:
        raise UserError(f"{kind} has {len(text):,} characters; at most {_LARGEST:,} are taken. Make it simpler.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{kind} has half of a character (a lone surrogate), which no text can hold.") from None
    return text


def _check_schema(schema: Mapping[str, object]) -> None:
    for key, value, depth in _members(schema):
        if depth > _DEPTH:
            raise UserError(f"json_schema is nested deeper than {_DEPTH} levels.")
        if key == "x-guidance":
            raise UserError("json_schema has 'x-guidance', which changes how a schema is read. Leave it out.")
        if key in ("const", "enum") and any(
            ord(sign) < 32 and sign not in "\b\f\n\r\t"
            for text in ([value] if isinstance(value, str) else value if isinstance(value, list) else [])
            if isinstance(text, str)
            for sign in text
        ):
            raise UserError(f"json_schema: {key} holds a control character, which would need \\uXXXX.")


def _members(value: object) -> Iterator[tuple[str, object, int]]:
    """(key, value, depth) of every member of an object, however deep."""
    waiting: list[tuple[object, int]] = [(value, 1)]
    while waiting:
        one, depth = waiting.pop()
        if depth > _DEPTH + 1:
            continue
        if isinstance(one, Mapping):
            for key, member in one.items():
                yield str(key), member, depth
            waiting += [(member, depth + 1) for member in one.values()]
        elif isinstance(one, (list, tuple)):
            waiting += [(member, depth + 1) for member in one]


class Matcher:
    """Where one row stands in its grammar.

    ``ended``: nothing can follow but an end. ``failure``: why nothing more can be said, None as long as all is well.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int, ends: Tensor, own_end: int) -> None:
        """``ends``: [E] int64, the tokens that end an answer. ``own_end``: the one that llguidance knows."""
        self._matcher, self._vocabulary, self._ends, self._own_end = matcher, vocabulary, ends, own_end
        self._end_ids = frozenset(ends.tolist())
        self.failure: str | None = None
        self.ended = False

    def mask(self) -> Tensor:
        """[V] bool: the tokens that may come next. Those that end the answer may where the grammar may end."""
        allowed = torch.zeros(self._vocabulary, dtype=torch.bool)
        if not self.ended and self._is_well():
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            if self._is_well():  # the mask may have been too much work, too
                found = np.unpackbits(bits, count=self._vocabulary, bitorder="little")
                allowed = torch.from_numpy(found.view(np.bool_))
        if self._own_end < self._vocabulary:
            allowed[self._own_end] = False
        allowed[self._ends] = self.ended or (self.failure is None and self._matcher.is_accepting())
        return allowed

    def accept(self, token: int) -> None:
        """Go on behind this token."""
        if token in self._end_ids:
            self.ended = True
        elif self.ended or not self._matcher.consume_token(token):
            self._is_well()
            self.failure = self.failure or f"token {token} is not what the constraint allows here."
        else:
            self.ended = self._matcher.is_stopped() and self._is_well()

    def _is_well(self) -> bool:
        if self.failure is None and self._matcher.is_error():
            self.failure = f"the constraint became too much work here: {_reason(self._matcher.get_error())}."
        return self.failure is None


def _reason(message: str) -> str:
    """One sentence of what llguidance says."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return told.split("<non-verbose/>")[0].strip(" .:")[:300]


class Grammars:
    """Compiles constraints for one tokenizer, and keeps those that were used last."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, stop_ids: Collection[int] = ()
    ) -> None:
        """``vocabulary_size``: of the model's logits, which may be more than the tokenizer has.

        Raises:
            UserError: llguidance is not installed, or does not know this kind of tokenizer.
        """
        self._vocabulary = vocabulary_size
        self._ends = torch.tensor(sorted(one for one in stop_ids if one < vocabulary_size), dtype=torch.int64)
        self._tokenizer, self._own_end = _guidance_tokenizer(tokenizer, vocabulary_size)
        self._strips = _strips_a_space(tokenizer)
        self._ready: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> Matcher:
        """A row's matcher, at the beginning of an answer. From any thread.

        Raises:
            UserError: llguidance cannot enforce the constraint, it allows no text, or is too much work.
        """
        with self._lock:
            ready = self._ready.get(constraint)
        if ready is None:
            ready = self._compile(constraint)
        with self._lock:
            self._ready[constraint] = ready
            self._ready.move_to_end(constraint)
            if len(self._ready) > _KEPT:
                self._ready.popitem(last=False)
            own = ready.deep_copy()
        return Matcher(own, self._vocabulary, self._ends, self._own_end)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        grammar = self._grammar(constraint, limits)
        ready = LLMatcher(self._tokenizer, grammar, limits=limits, log_level=0)
        allowed = Matcher(ready, self._vocabulary, self._ends, self._own_end).mask()
        if ready.is_error():
            raise _refusal(constraint, ready.get_error())
        allowed[self._ends] = False
        if not allowed.any():
            raise UserError(f"{constraint.kind} cannot be enforced: it allows no text of this tokenizer's tokens.")
        return ready

    def _grammar(self, constraint: Constraint, limits: LLParserLimits) -> str:
        """The grammar in llguidance's form; refused if another process finds it wrong or endless."""
        from llguidance import LLMatcher, regex_to_lark

        # Such a tokenizer takes one space from the beginning of a text: the token of a word has it.
        space = " " if self._strips else ""
        if constraint.kind == "choice":
            words = (_SIGNS.sub(r"\\\g<0>", one) for one in dict.fromkeys(parse_json(constraint.text, constraint.kind)))
            return LLMatcher.grammar_from_regex(f"{space}(?:{'|'.join(words)})")
        if constraint.kind == "regex":
            grammar = LLMatcher.grammar_from_regex(constraint.text)
            if message := LLMatcher.validate_grammar(grammar, limits=limits):
                raise _refusal(constraint, message)
            # A rule of its own, because ^ may stand at the beginning of an expression alone.
            rule = regex_to_lark(constraint.text, use_ascii="")
            return LLMatcher.grammar_from_lark(f'start: " " rest\nrest: /{rule}/') if space else grammar
        schema = (
            {"type": "object"} if constraint.kind == "json_object" else parse_json(constraint.text, constraint.kind)
        )
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
        if any(key in _ENDLESS for key, _, _ in _members(schema)) and (message := _look(grammar)):
            raise _refusal(constraint, message)
        return grammar


def _look(grammar: str) -> str:
    """What llguidance says of a grammar, in a process that can be ended."""
    words = [sys.executable, "-I", str(_LOOK)]
    try:
        done = subprocess.run(words, input=grammar.encode(), capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"it takes longer than {_SECONDS:.0f} seconds to build; make its patterns and multipleOf simpler"
    if done.returncode:
        return f"llguidance gave up: {_reason(done.stderr.decode(errors='replace') or 'it died')}"
    return done.stdout.decode()


def _refusal(constraint: Constraint, message: str) -> UserError:
    reason = _reason(message)
    if "coerce_one_of" in reason:
        reason = "oneOf is not supported; use anyOf"
    if reason.startswith("NoExtension"):
        reason = "it allows no text"
    return UserError(f"{constraint.kind} cannot be enforced: {reason}.")


def _guidance_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[LLTokenizer, int]:
    """The tokenizer as llguidance takes it, with one end token of its own, and the id of that."""
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise UserError('constrained answers need llguidance: pip install "weft[constrain]".') from None
    from tokenizers import AddedToken

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"constrained answers need a fast tokenizer; {type(tokenizer).__name__} is none.")
    backend = copy(backend)
    backend.no_padding()
    backend.no_truncation()
    end = "<|end of a constrained answer|>"
    backend.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    own_end = backend.token_to_id(end)
    try:
        return LLTokenizer(backend.to_str(), n_vocab=max(vocabulary, own_end + 1), eos_token=own_end), own_end
    except ValueError as error:
        raise UserError(
            f"constrained answers do not know this kind of tokenizer ({reason_of(error)[:200]}); they know byte-level "
            "BPE, and BPE and unigram with byte tokens."
        ) from None


def _strips_a_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the first token of a text loses its space when it is decoded."""
    for token, number in tokenizer.get_vocab().items():
        if len(token) > 1 and token.startswith("▁") and token[1:].isalpha():
            return not str(tokenizer.decode([number])).startswith(" ")
    return False
