"""BLEU (Papineni et al. 2002) and chrF (Popović 2015) of a whole corpus, by sacrebleu, on its scale from 0 to 100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from weft.errors import UserError
from weft.evaluate.metrics.base import Figure, Metric, Reply, is_cjk
from weft.evaluate.metrics.errors import bootstrap_error

_SAMPLES = 100  # each one scores a whole corpus; lm_eval takes as many


class _OfCorpus(Metric):
    """A figure of the whole corpus, with a bootstrap; that of one reply alone is sacrebleu's of a sentence."""

    def scorer(self, references: Sequence[str], *, alone: bool) -> Any:
        """sacrebleu's metric for texts like these."""
        raise NotImplementedError

    def score(self, reply: Reply) -> float:
        scorer = self.scorer(reply.references, alone=True)
        return float(scorer.sentence_score(reply.text or "", list(reply.references)).score)

    def figure(self, replies: Sequence[Reply], scores: Sequence[float], seed: int) -> Figure:
        scorer = self.scorer([one for reply in replies for one in reply.references], alone=False)
        most = max(len(reply.references) for reply in replies)

        def over(places: Sequence[int]) -> float:
            chosen = [replies[place] for place in places]
            streams = [[(*reply.references, *[None] * most)[n] for reply in chosen] for n in range(most)]
            return float(scorer.corpus_score([reply.text or "" for reply in chosen], streams).score)

        return Figure(over(range(len(replies))), bootstrap_error(over, len(replies), seed=seed, samples=_SAMPLES))


class Bleu(_OfCorpus):
    """BLEU of the corpus, with sacrebleu's tokens."""

    tokenize: str | None = Field(
        None, description="sacrebleu's tokenizer: 13a, zh, char, intl …; default: zh for Chinese references, else 13a"
    )

    def scorer(self, references: Sequence[str], *, alone: bool) -> Any:
        tokenize = self.tokenize or ("zh" if is_cjk("".join(references)) else "13a")
        return _sacrebleu().BLEU(tokenize=tokenize, effective_order=alone)

    def model_post_init(self, _: object) -> None:
        """Check the settings.

        Raises:
            UserError: sacrebleu is not installed, or has no such tokenizer.
        """
        known = _sacrebleu().BLEU.TOKENIZERS
        if self.tokenize is not None and self.tokenize not in known:
            raise UserError(f"bleu: tokenize is {self.tokenize!r}; expected one of {', '.join(sorted(known))}.")


class ChrF(_OfCorpus):
    """chrF of the corpus; with ``word_order`` 2 it is chrF++."""

    word_order: int = Field(0, ge=0, description="the longest run of words that counts beside characters")

    def scorer(self, references: Sequence[str], *, alone: bool) -> Any:
        return _sacrebleu().CHRF(word_order=self.word_order)

    def model_post_init(self, _: object) -> None:
        _sacrebleu()


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise UserError('the metrics bleu and chrf need sacrebleu: pip install "weft[evaluate]".') from None
    return metrics
