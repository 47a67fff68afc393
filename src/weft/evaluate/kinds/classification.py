"""Classes that a classification adapter names."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from weft.errors import UserError
from weft.evaluate.classify import classes_of
from weft.evaluate.entrants import Entrant
from weft.evaluate.kept_answers import key_of
from weft.evaluate.kinds.base import Answered, TaskWork
from weft.evaluate.metrics import Reply
from weft.evaluate.panel import Ask, Panel, code_mark
from weft.evaluate.tasks import Exercise


class Classification(TaskWork):
    """Texts are read as in the training of each adapter, labels as well where the task has no ``reference``."""

    at_once = 256

    def refusal(self, entrant: Entrant) -> str:
        if entrant.adapter is None:
            return "a base names no classes"
        try:
            classes_of(self.target.adapters, entrant.adapter)
        except UserError:
            return "it was not trained to classify"
        return ""

    def check(self, entrants: Sequence[Entrant], exercises: Sequence[Exercise]) -> None:
        for entrant in entrants:
            deque(self._asked(entrant, exercises), maxlen=0)  # which finds labels that are missing

    def ask(self, panel: Panel, entrants: Sequence[Entrant], exercises: Sequence[Exercise]) -> Iterator[Answered]:
        asked = [(entrant, place, one) for entrant in entrants for place, one in self._asked(entrant, exercises)]
        for number, label in panel.classify([ask for _, _, (ask, _) in asked]):
            entrant, place, (ask, right) = asked[number]
            exercise = exercises[place]
            reply = Reply(label, (right,), fields=exercise.record.fields)
            yield self.answered(
                entrant, exercise, [reply] * len(self.task.metrics), output=label, read=len(ask.what.input_ids),
                written=0, asked=str(exercise.record.fields), reference=right,
            )  # fmt: skip

    def _asked(self, entrant: Entrant, exercises: Sequence[Exercise]) -> Iterator[tuple[int, tuple[Ask, str]]]:
        """(place of an exercise, what is asked and the right class)."""
        assert entrant.adapter is not None
        records, known = [one.record for one in exercises], classes_of(self.target.adapters, entrant.adapter)
        for query in self.target.queries(records, entrant.adapter):
            exercise = exercises[query.number]
            right = next(iter(exercise.references), "").strip() or query.label
            if right is None:
                raise UserError(
                    f"{exercise.source}: the record has no label that the training of '{entrant.adapter}' would find. "
                    "Say which field it is: reference: '{{ label }}'."
                )
            if right not in known:
                raise UserError(
                    f"{exercise.source}: adapter '{entrant.adapter}' has no class '{right}'. It has {', '.join(known)}."
                )
            sample = query.prompt
            key = key_of("panel.classify", code_mark(), sample.input_ids, list(sample.token_types), list(sample.slots))
            yield query.number, (Ask(entrant.adapter, key, sample), right)
