"""The kinds of task; one file for each."""

from collections.abc import Mapping

from weft.evaluate.kinds.base import Answered, TaskWork
from weft.evaluate.kinds.classification import Classification
from weft.evaluate.kinds.generation import Generation
from weft.evaluate.kinds.multiple_choice import MultipleChoice
from weft.evaluate.kinds.perplexity import TextPerplexity
from weft.evaluate.results import TaskKind

KINDS: Mapping[TaskKind, type[TaskWork]] = {
    "multiple_choice": MultipleChoice,
    "generation": Generation,
    "perplexity": TextPerplexity,
    "classification": Classification,
}

__all__ = ["KINDS", "Answered", "TaskWork"]
