"""Forgetting while training: how much worse than the base each job tells general text."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from weft.core.adapters import Adapters
from weft.data import PlainText, Renderer, Sample
from weft.errors import UserError
from weft.files.whole import write_whole
from weft.foreign import entry, json_lines
from weft.objectives.passes import EVALUATION_TOKENS, Work, passes, sequence_losses
from weft.ops.seeds import stable_seed
from weft.training.job import Job
from weft.training.rolled import Ask, Write
from weft.training.settings import OWN_TEXT, RunConfig

# The file in a run's folder with the texts that its base wrote.
OWN_TEXT_FILE = "forgetting_eval.jsonl"
# How many texts a base writes, of at most so many tokens.
_TEXTS, _TOKENS = 64, 128
# A job's text goes through the model in pieces of so many tokens, however many jobs share a pass: so its losses are
# those that it would have alone.
_PIECE = EVALUATION_TOKENS // 4


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """How a job tells general text, in nats.

    Attributes:
        forgetting: the job's loss per token minus the base's; above 0 it has forgotten.
        forgetting_stderr: its standard error over texts, as that of a ratio of sums; None with one text.
        forgetting_per_byte: the same difference per byte of UTF-8, which compares across tokenizers.
        general_loss, general_base_loss: both losses per token.
    """

    forgetting: float
    forgetting_stderr: float | None
    forgetting_per_byte: float
    general_loss: float
    general_base_loss: float

    def event(self) -> dict[str, float | None]:
        """The figures by their keys in ``metrics.jsonl``."""
        return asdict(self)


class Forgetting:
    """Measures jobs on general text; the base's own loss is computed once.

    Args:
        samples: texts of which every token counts.
        tokenizer: turns their tokens into the bytes that they stand for.

    Attributes:
        sha256: of the texts' tokens and weights.
        tokens: how many tokens count.
        bytes: the bytes of UTF-8 that these stand for.

    Raises:
        UserError: No token counts, as in texts of one token each.
    """

    def __init__(self, adapters: Adapters, samples: Sequence[Sample], tokenizer: Any) -> None:
        self.adapters, self.samples = adapters, samples
        self.weights = [sum(sample.written[1]) for sample in samples]
        self.tokens, self.bytes, digest = sum(self.weights), 0, hashlib.sha256()
        for sample in samples:
            ids, weights = sample.written
            told = [token for token, weight in zip(ids, weights, strict=True) if weight]
            self.bytes += len(str(tokenizer.decode(told, skip_special_tokens=True)).encode(errors="replace"))
            digest.update(json.dumps([list(ids), list(weights)]).encode())
        self.sha256 = digest.hexdigest()
        if not self.tokens:
            raise UserError(
                f"forgetting_eval: there is nothing to measure on: {len(samples)} texts, in which nothing follows the "
                "first token. Give longer ones."
            )
        self._base: list[float] | None = None

    def facts(self) -> dict[str, object]:
        """What ``run.json`` keeps of the text."""
        return {"sha256": self.sha256, "texts": len(self.samples), "tokens": self.tokens, "bytes": self.bytes}

    def measure(self, names: Sequence[str], should_stop: Callable[[], bool]) -> dict[str, Forgotten] | None:
        """How each adapter of ``names`` tells the text, all in shared passes; None if ``should_stop`` said yes."""
        if self._base is None:
            found = self._losses([None], should_stop)
            if found is None:
                return None
            self._base = found[None]
        losses = self._losses(names, should_stop)
        return None if losses is None else {name: self._compared(losses[name], self._base) for name in names}

    def _compared(self, losses: Sequence[float], base: Sequence[float]) -> Forgotten:
        """The figures of summed losses of each text, [texts]."""
        more = [own - plain for own, plain in zip(losses, base, strict=True)]
        mean, count = math.fsum(more) / self.tokens, len(more)
        squares = math.fsum((one - mean * weight) ** 2 for one, weight in zip(more, self.weights, strict=True))
        return Forgotten(
            forgetting=mean,
            forgetting_stderr=math.sqrt(squares * count / (count - 1)) / self.tokens if count > 1 else None,
            forgetting_per_byte=math.fsum(more) / max(self.bytes, 1),
            general_loss=math.fsum(losses) / self.tokens,
            general_base_loss=math.fsum(base) / self.tokens,
        )

    @torch.no_grad()
    def _losses(
        self, names: Sequence[str | None], should_stop: Callable[[], bool]
    ) -> dict[str | None, list[float]] | None:
        found: dict[str | None, list[float]] = {name: [] for name in names}
        for texts in passes(self.samples, _PIECE):
            together = max(1, EVALUATION_TOKENS // sum(text.size for text in texts))
            for begin in range(0, len(names), together):
                if should_stop():
                    return None
                some = names[begin : begin + together]
                for name, losses in zip(some, sequence_losses(self.adapters, [Work(one, texts) for one in some]),
                                        strict=True):  # fmt: skip
                    found[name] += losses.double().tolist()
        return found


def is_due(job: Job, *, anywhere: bool = False) -> bool:
    """Whether a job's forgetting is to be measured: as often as it is evaluated, or ``anywhere``; once a step.

    What has a head of its own writes no text.
    """
    progress = job.progress
    if not job.adapter.head.writes or progress.ended not in (None, "finished"):
        return False
    return progress.forgetting_at != progress.step and (anywhere or job.at_evaluation)


def take_note(job: Job, change: float) -> None:
    """Let a job know that its loss on general text is ``change`` nats per token above the base's.

    More than ``max_forgetting`` ends it, and it goes back to the last weights that were not above. At a checkpoint
    between two evaluations nothing is decided: ``save_steps`` must change no result.
    """
    progress, limit = job.progress, job.config.max_forgetting
    progress.forgetting = change if math.isfinite(change) else None
    progress.forgetting_at = progress.step
    if limit is None or not job.at_evaluation:
        return
    if change <= limit:
        if not job.keeps_best:
            job.keep()
        return
    told = f"at step {progress.step} it forgets {change:.4f} nats per token, more than max_forgetting ({limit:g})"
    if job.best is None:
        job.fail(f"{told}, and no weights before were below; take a larger max_forgetting")
        return
    progress.ended, progress.reason = "max_forgetting", told
    if progress.best_at and progress.forgetting_kept is not None:
        progress.reason += f"; the weights of step {progress.best_at} are kept ({progress.forgetting_kept:.4f})"


def text_to_measure(
    config: RunConfig,
    adapters: Adapters,
    renderer: Renderer,
    *,
    given: Sequence[Sample] | None,
    folder: Path,
    writer: Callable[[], Write] | None,
    recorded: Mapping[str, object] | None,
) -> Forgetting | None:
    """What measures forgetting in a run; None: nothing is to be measured. A base's own texts are drawn where need be.

    Args:
        given: the texts that were read, where the run names files.
        folder: the run's, in which a base's own texts stay.
        writer: makes what lets the base write.
        recorded: what ``run.json`` says of the text that the run began with.

    Raises:
        UserError: Nothing lets the base write, it wrote nothing, or the text is not the one that the run began with.
    """
    if config.forgetting_eval is None:
        return None
    if config.forgetting_eval == OWN_TEXT:
        given = _own_samples(folder / OWN_TEXT_FILE, adapters, renderer, writer)
    assert given is not None
    found = Forgetting(adapters, given, renderer.tokenizer)
    if recorded is not None and recorded.get("sha256", found.sha256) != found.sha256:
        raise UserError(
            "cannot resume: the text of forgetting_eval is not what the run began with (its tokens have another hash). "
            "Put it back, or begin a new run in another output_dir."
        )
    return found


def _own_samples(
    path: Path, adapters: Adapters, renderer: Renderer, writer: Callable[[], Write] | None
) -> list[Sample]:
    if not path.is_file():
        if writer is None:
            raise UserError("forgetting_eval: base: the base is to write texts, and nothing was given that lets it "
                            "(writer).")  # fmt: skip
        texts = draw_texts(adapters, renderer, writer())
        write_whole(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    read = [
        PlainText(entry(line, "text", str, f"{path}:{number}"), f"{path}:{number}")
        for number, line in enumerate(json_lines(path), 1)
    ]
    return [renderer.sample(text) for text in read]


def draw_texts(adapters: Adapters, renderer: Renderer, write: Write, *, seed: int = 0) -> list[str]:
    """Texts that the plain base writes from nothing, at temperature 1: the likeliest stand-in for what it was trained
    on, where no such text is at hand.

    Raises:
        UserError: The tokenizer has no token that a text begins after, or the base wrote nothing but white space.
    """
    tokenizer, room = renderer.tokenizer, _room(adapters, renderer)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise UserError(
            "forgetting_eval: base: the tokenizer has neither a bos token nor an eos token for a text to begin after. "
            "Name a file of general text."
        )
    asks = [
        Ask(None, [begin], slots=(), max_new_tokens=room, temperature=1.0, top_p=1.0, top_k=0,
            seed=stable_seed(seed, "forgetting_eval", number))
        for number in range(_TEXTS)
    ]  # fmt: skip
    texts = [text for text in (answer.text for answer in write(asks)) if len(text.strip()) > 1]
    if not texts:
        raise UserError("forgetting_eval: base: the base wrote nothing but white space. Name a file of general text.")
    return texts


def _room(adapters: Adapters, renderer: Renderer) -> int:
    """How long a text may be. It is read again as tokens, which may be more, and learned ones stand before it."""
    learned = max((adapters[name].num_learned_tokens for name in adapters.names), default=0)
    limits = [one for one in (renderer.max_length, adapters.architecture.max_length) if one is not None]
    return max(1, min(_TOKENS, *((limit - learned) // 2 for limit in limits)))
