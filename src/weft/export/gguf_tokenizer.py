"""A tokenizer in the settings of a GGUF file, and the proof that llama.cpp will give the same ids.

llama.cpp does not read ``tokenizer.json``. It has two algorithms that matter here: byte-level BPE, whose first cut of a
text is an expression that llama.cpp knows under a name, and SentencePiece's, which joins the two neighbours whose token
has the best score. Which settings give a tokenizer's ids is found by a trial: both algorithms are rebuilt here from the
settings alone, and run on many texts beside the tokenizer itself. A tokenizer that none of them matches is refused.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from weft.data import Message
from weft.data.rendering.sandbox import render_chat
from weft.data.rendering.served import message_fields, opening
from weft.errors import UserError
from weft.export.gguf_file import Value
from weft.export.proof import fixed_texts
from weft.foreign import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# llama.cpp's kinds of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASELESS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of first cuts, and the expressions that they stand for, one after the other. Where two give the same
# ids the first is taken, so those that cut digits apart come before those that do not.
CUTS: dict[str, tuple[str, ...]] = {
    "smollm": (r"\p{N}", _WORDS),
    "gpt-2": (_WORDS,),
    "qwen2": (_CASELESS.replace("DIGITS", ""),),
    "llama-bpe": (_CASELESS.replace("DIGITS", "{1,3}"),),
}
# With this cut llama.cpp takes a word that is a token whole, without joining pieces.
_WHOLE_WORDS = ("llama-bpe",)
_SPACE = "▁"
_TEXTS = (
    "", " ", "a", " a", "a ", "Hello, world!", "it's we'll I'M THEY'VE don't", "  two  spaces   three", "\n",
    "\n\n\n a\n", "tabs\tand\r\nlines \n ends", "12 345 6789 1234567890 3.14 1,000",
    "def f(x):\n    return x ** 2  # squared\n", "今天天气怎么样？请用一句话回答。", "abc今天def 今 天",
    "日本語のテキスト、カタカナ。", "한국어 문장입니다.", "Привет, как дела?", "مرحبا كيف حالك", "שלום עולם",
    "नमस्ते दुनिया", "สวัสดีชาวโลก", "Grüße, naïve café ÆØÅ", "😀 👩\u200d👩\u200d👧 🧵a", "∑∫√ ≤≥ €£¥ «»",
    '{"key": [1, 2.5, null]}', "<html> &amp; </html>", "a" * 50, "....!!!???---", "x\u00a0y\u2003z", "\u200bzero",
    "ﬁ ½ ²",
)  # fmt: skip
_LETTERS = "abcXYZ '’0123456789\n\t .,!?-_<>|#/é今天日の한д€😀"
_RANDOM_TEXTS, _RANDOM_LENGTH = 200, 24


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer's settings in GGUF, with what the user should know.

    Attributes:
        settings: the keys that begin with ``tokenizer.``.
        adds_bos: whether llama.cpp puts the BOS before a text.
    """

    settings: dict[str, Value]
    adds_bos: bool
    notes: tuple[str, ...]


def trial_texts() -> list[str]:
    """Texts of many scripts and shapes, the same each time."""
    draw = random.Random(0)
    drawn = ["".join(draw.choices(_LETTERS, k=draw.randint(1, _RANDOM_LENGTH))) for _ in range(_RANDOM_TEXTS)]
    return [*_TEXTS, *fixed_texts(), *drawn]


def gguf_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    *,
    ends: Sequence[int],
    adds_bos: bool,
    conversations: Sequence[Sequence[Message]],
) -> GgufTokenizer:
    """The settings with which llama.cpp gives a tokenizer's ids.

    Args:
        rows: the rows of the model's table of embeddings; those beyond the tokenizer become unused tokens.
        ends: the tokens that end an answer, the most usual first.
        adds_bos: whether the tokenizer puts the BOS before a text.
        conversations: what the chat template is tried on.

    Raises:
        UserError: llama.cpp has no algorithm that gives these ids, or no place for something.
    """
    made = _Vocabulary(tokenizer)
    asked = [*conversations, *([Message("user", text)] for text in trial_texts())]
    chats = [(messages, text) for messages in asked if (text := _rendered(tokenizer, messages)) is not None]
    trials = [(_try(tokenizer, candidate.encode, chats), candidate) for candidate in made.candidates()]
    if not trials or min(trials, key=_first)[0].fails(bool(chats)):
        example = f": {min(trials, key=_first)[0].example!r} would become other tokens" if trials else ""
        raise UserError(
            f"the tokenizer ({made.kind}) is none that llama.cpp gives the ids of{example}; a GGUF of it would read "
            "prompts wrongly. Export --to peft, or merge the adapter (weft merge) and serve the folder elsewhere."
        )
    trial, candidate = min(trials, key=_first)
    notes = []
    if trial.texts:
        notes.append(f"plain text outside of a conversation gets other tokens in llama.cpp (as {trial.example!r}); "
                     "questions in a conversation get those of training.")  # fmt: skip
    if trial.turns:
        notes.append(f"warning: {trial.turns} conversations of several turns that were tried get other tokens in "
                     "llama.cpp, whose tokenizer puts a space where this one does not.")  # fmt: skip
    settings = made.settings(rows, ends) | candidate.settings | {"tokenizer.ggml.add_bos_token": adds_bos}
    if isinstance(tokenizer.chat_template, str):
        settings["tokenizer.chat_template"] = tokenizer.chat_template
    return GgufTokenizer(settings, adds_bos, tuple([*notes, *made.notes]))


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str | None:
    try:
        return render_chat(tokenizer, message_fields(messages), add_generation_prompt=True)
    except Exception:  # a template is a program, and refuses some conversations
        return None


Encode = Callable[[str], list[int]]
Chats = Sequence[tuple[Sequence[Message], str]]


@dataclass(frozen=True)
class Candidate:
    """Settings, and the algorithm that llama.cpp would run with them."""

    settings: dict[str, Value]
    encode: Encode


@dataclass(frozen=True, order=True)
class _Trial:
    """How many openings of conversations, plain texts, and conversations of several turns an algorithm got wrong."""

    openings: int
    texts: int
    turns: int
    example: str

    def fails(self, chats: bool) -> bool:
        """Whether it got something wrong that matters; plain texts matter where there are no conversations."""
        return bool(self.openings or (self.texts and not chats))


def _first(pair: tuple[_Trial, Candidate]) -> _Trial:
    return pair[0]


def _try(tokenizer: PreTrainedTokenizerBase, encode: Encode, chats: Chats) -> _Trial:
    def wrong(text: str) -> bool:
        return encode(text) != list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    texts = [text for text in trial_texts() if wrong(text)]
    openings = [text for messages, text in chats if opening(messages) and wrong(text)]
    turns = [text for messages, text in chats if not opening(messages) and wrong(text)]
    return _Trial(len(openings), len(texts), len(turns), (openings or texts or [""])[0])


class _Vocabulary:
    """The parts of a ``tokenizer.json`` that a GGUF file has a place for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) has no tokenizer.json, from which its GGUF is made; load "
                "and save it with transformers' fast tokenizer first."
            )
        self.tokenizer = tokenizer
        self.parts: dict[str, Any] = parse_json(tokenizer.backend_tokenizer.to_str(), "the tokenizer")
        self.model: dict[str, Any] = self.parts["model"]
        self.notes: list[str] = []
        added = self.parts.get("added_tokens") or []
        stripping = [one["content"] for one in added if one["lstrip"] or one["rstrip"] or one["single_word"]]
        if stripping:
            raise UserError(
                f"the tokenizer's tokens {', '.join(map(repr, stripping[:3]))} take the spaces beside them, for which "
                "GGUF has no place. Export --to peft, or merge the adapter (weft merge) and serve the folder elsewhere."
            )
        self.special = {one["id"]: bool(one["special"]) for one in added}
        self.texts = {number: text for text, number in tokenizer.get_vocab().items()}

    @property
    def kind(self) -> str:
        """What it is, in words."""
        cut = self.parts.get("pre_tokenizer") or {}
        steps = [step["type"] for step in cut.get("pretokenizers", [cut] if cut else [])]
        return f"{self.model['type']}{' after ' if steps else ''}{', '.join(steps)}"

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs that are joined, the first ones first."""
        given = self.model.get("merges") or []
        pairs = (one.split(" ", 1) if isinstance(one, str) else one for one in given)
        return [(left, right) for left, right in pairs]

    def candidates(self) -> list[Candidate]:
        """The algorithms of llama.cpp that this may be."""
        if self.model["type"] != "BPE" or self.model.get("dropout"):
            return []
        if self.model.get("byte_fallback") or any(_SPACE in text for text in self.model["vocab"]):
            return [self._sentencepiece(prefix) for prefix in (True, False)]
        return [self._bytes(name, cut) for name, cut in CUTS.items()]

    def _bytes(self, name: str, cut: Sequence[str]) -> Candidate:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        model = models.BPE(self.model["vocab"], self.merges, ignore_merges=name in _WHOLE_WORDS)
        rebuilt = Tokenizer(model)
        rebuilt.pre_tokenizer = pre_tokenizers.Sequence(
            [*(pre_tokenizers.Split(Regex(one), "isolated") for one in cut),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )  # fmt: skip
        pieces = _cutter(self._literals())

        def encode(text: str) -> list[int]:
            found: list[int] = []
            for piece, number in pieces(text):
                found += rebuilt.encode(piece).ids if number is None else [number]
            return found

        settings: dict[str, Value] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in self.merges],
        }
        return Candidate(settings, encode)

    def _sentencepiece(self, prefix: bool) -> Candidate:
        scores, pieces = self.scores(), _cutter(self._literals())
        numbers = {self.texts[number]: number for number in self.texts}

        def encode(text: str) -> list[int]:
            found, fresh = [], True
            for piece, number in pieces(text):
                if number is None:
                    lead = " " if prefix and fresh else ""
                    found += sentencepiece_ids((lead + piece).replace(" ", _SPACE), numbers, scores)
                else:
                    found.append(number)
                fresh = number is not None
            return found

        settings: dict[str, Value] = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": prefix,
            "tokenizer.ggml.scores": [scores.get(self.texts[number], 0.0) for number in sorted(self.texts)],
        }
        return Candidate(settings, encode)

    def scores(self) -> dict[str, float]:
        """For each token that is a joined pair, a score that falls with the place of its first pair."""
        found: dict[str, float] = {}
        for place, (left, right) in enumerate(self.merges):
            found.setdefault(left + right, -float(place))
        lowest = -float(len(self.merges))
        return {text: found.get(text, lowest) for text in self.model["vocab"]}

    def _literals(self) -> dict[str, int]:
        return {self.texts[number]: number for number in self.special}

    def settings(self, rows: int, ends: Sequence[int]) -> dict[str, Value]:
        """The tokens, their kinds, and the numbers of the special ones."""
        size = max(self.texts) + 1
        if size > rows:
            raise UserError(f"the tokenizer has {size} tokens, and the model has rows for {rows}.")
        tokens = [self.texts.get(number, f"[PAD{number}]") for number in range(rows)]
        found: dict[str, Value] = {
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [self._type(number) for number in range(rows)],
        }
        names = {"bos": "bos_token_id", "padding": "pad_token_id", "unknown": "unk_token_id"}
        for name, key in names.items():
            number = getattr(self.tokenizer, key, None)
            if isinstance(number, int):
                found[f"tokenizer.ggml.{name}_token_id"] = number
        places = ("eos", "eot", "eom")
        if len(ends) > len(places):
            self.notes.append(f"GGUF has places for {len(places)} tokens that end an answer; of {list(ends)} the first "
                              f"{len(places)} are written.")  # fmt: skip
        for name, number in zip(places, ends, strict=False):
            found[f"tokenizer.ggml.{name}_token_id"] = number
        return found

    def _type(self, number: int) -> int:
        if number not in self.texts:
            return _UNUSED
        text = self.texts[number]
        if number in self.special:
            unknown = text == self.model.get("unk_token") or number == getattr(self.tokenizer, "unk_token_id", None)
            return _UNKNOWN if unknown else _CONTROL if self.special[number] else _USER_DEFINED
        byte = self.model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        return _BYTE if byte else _NORMAL


def _cutter(literals: dict[str, int]) -> Callable[[str], list[tuple[str, int | None]]]:
    """A function that cuts a text at tokens that are found before all others, longest first."""
    import regex

    names = sorted(literals, key=lambda text: (-len(text), text))
    pattern = regex.compile("|".join(map(regex.escape, names))) if names else None

    def pieces(text: str) -> list[tuple[str, int | None]]:
        found: list[tuple[str, int | None]] = []
        at = 0
        for match in pattern.finditer(text) if pattern is not None else ():
            found += [(text[at : match.start()], None), (match[0], literals[match[0]])]
            at = match.end()
        return [(piece, number) for piece, number in [*found, (text[at:], None)] if piece]

    return pieces


def sentencepiece_ids(text: str, numbers: dict[str, int], scores: dict[str, float]) -> list[int]:
    """The ids of a text by SentencePiece's algorithm: again and again the neighbours with the best score are joined.

    What is no token in the end is written by its bytes.
    """
    symbols, before, after = list(text), list(range(-1, len(text) - 1)), [*range(1, len(text)), -1]
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (joined := symbols[left] + symbols[right]) in numbers:
            heapq.heappush(queue, (-scores.get(joined, 0.0), left, right, joined))

    for place in range(1, len(symbols)):
        offer(place - 1, place)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joined:
            continue
        symbols[left], symbols[right], after[left] = joined, "", after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    found: list[int] = []
    for symbol in filter(None, symbols):
        bytes_of = [numbers.get(f"<0x{byte:02X}>", -1) for byte in symbol.encode()]
        found += [numbers[symbol]] if symbol in numbers else bytes_of
    return found
