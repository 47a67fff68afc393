"""What a generator is asked, and the single draws that a request is made of."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace

from weft.data import Message
from weft.data.rendering.served import message_fields
from weft.errors import UserError
from weft.generation.sampling import Sampling
from weft.ops.seeds import stable_seed


@dataclass(frozen=True)
class GeneratorRequest:
    """A conversation that is to be answered ``n`` times.

    Args:
        messages: The conversation; its last turn is the user's. A text is one such turn.
        n: How many answers. Each is a request of its own, so that one that fails costs no other.
        sampling: How tokens are chosen. The first answer is drawn with its seed, each other with one made of it.
        max_tokens: The longest answer.
        stop: Strings that end an answer; they are no part of it.
        schema: A JSON schema that every answer must keep. One that does not is a failure.
        keep_cut: Whether an answer that ended at ``max_tokens`` is a result. Otherwise it is a failure.

    Raises:
        UserError: There is no turn of the user's at the end, or a number is out of its range.
    """

    messages: Sequence[Message] | str
    n: int = 1
    _: KW_ONLY
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 512
    stop: Sequence[str] = ()
    schema: Mapping[str, object] | None = None
    keep_cut: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.messages, str):
            object.__setattr__(self, "messages", (Message("user", self.messages),))
        if not self.turns or self.turns[-1].role != "user":
            raise UserError(
                "a generator needs a conversation whose last turn is the user's; many servers refuse others."
            )
        for name in ("n", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; at least 1 is needed.")

    @property
    def turns(self) -> Sequence[Message]:
        """The messages."""
        assert not isinstance(self.messages, str)
        return self.messages

    def key(self, model: str) -> str:
        """The SHA-256 of all that an answer of this model depends on, but for its number among several."""
        drawn = {**asdict(self.sampling), "logit_bias": sorted(self.sampling.logit_bias.items())}
        parts = {
            "model": model,
            "messages": message_fields(self.turns),
            "sampling": drawn,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
            "schema": self.schema,
            "keep_cut": self.keep_cut,
        }
        text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def prompt_bytes(self) -> int:
        """The bytes of all that the model reads."""
        said = sum(len(f"{turn.role}{turn.content}".encode("utf-8", "surrogatepass")) for turn in self.turns)
        return said + (0 if self.schema is None else len(json.dumps(self.schema, ensure_ascii=False).encode()))


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One answer that is wanted.

    Attributes:
        place, sample: the request's place in the call, and which of its ``n`` answers it is.
        key, index: by which the ledger knows it. ``index`` counts the answers to equal requests.
    """

    request: GeneratorRequest
    place: int
    sample: int
    key: str
    index: int

    def sampling(self, attempt: int = 0) -> Sampling:
        """How its tokens are chosen. An attempt after an answer that was of no use has a seed of its own."""
        own = self.request.sampling
        if not self.index and not attempt:
            return own
        return replace(own, seed=stable_seed(own.seed, self.index, *([attempt] if attempt else [])))


def draws_of(requests: Iterable[GeneratorRequest], model: str) -> list[Draw]:
    """Every answer that the requests want, in their order. Equal requests get different indices, so that none is lost
    and each has a draw of its own."""
    counts: Counter[str] = Counter()
    found = []
    for place, request in enumerate(requests):
        key = request.key(model)
        for sample in range(request.n):
            found.append(Draw(request=request, place=place, sample=sample, key=key, index=counts[key]))
            counts[key] += 1
    return found
