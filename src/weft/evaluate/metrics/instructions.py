"""IFEval: the share of prompts of which every instruction is followed, and the share of instructions, each strictly
and loosely.

The loose figures take an answer also without its first line, its last line or its stars (Zhou et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping

from weft.errors import UserError
from weft.evaluate.ifeval import follows, follows_loosely
from weft.evaluate.metrics.base import Metric, Reply

_NAMES, _SETTINGS = "instruction_id_list", "kwargs"


class FollowedAll(Metric):
    """1 where all instructions of the prompt are followed."""

    needs_reference = False
    fields = (_NAMES, _SETTINGS)

    def score(self, reply: Reply) -> float:
        return float(all(self.followed(reply)))

    def followed(self, reply: Reply) -> list[bool]:
        """Of each instruction of the prompt, whether the answer follows it.

        Raises:
            UserError: The record's instructions are none of IFEval's.
        """
        return [self.follows(reply.text or "", name, settings) for name, settings in instructions(reply.fields)]

    def follows(self, answer: str, instruction: str, settings: Mapping[str, object]) -> bool:
        """Whether an answer follows an instruction.

        Raises:
            UserError: There is no such instruction, or a setting of it is missing.
        """
        return follows(answer, instruction, settings)


class FollowedEach(FollowedAll):
    """The share of instructions that are followed. Those of one prompt depend on each other, which the error minds."""

    def score(self, reply: Reply) -> float:
        found = self.followed(reply)
        return sum(found) / len(found)

    def weight(self, reply: Reply) -> float:
        return float(len(instructions(reply.fields)))


class FollowedAllLoosely(FollowedAll):
    """1 where all instructions of the prompt are followed loosely."""

    def follows(self, answer: str, instruction: str, settings: Mapping[str, object]) -> bool:
        return follows_loosely(answer, instruction, settings)


class FollowedEachLoosely(FollowedEach):
    """The share of instructions that are followed loosely."""

    def follows(self, answer: str, instruction: str, settings: Mapping[str, object]) -> bool:
        return follows_loosely(answer, instruction, settings)


def instructions(fields: Mapping[str, object]) -> list[tuple[str, dict[str, object]]]:
    """The instructions of a record, each with its settings; those that are null, as the hub's copy has them, are none.

    Raises:
        UserError: The two lists are missing, or not of one length.
    """
    names, settings = fields.get(_NAMES), fields.get(_SETTINGS)
    if not isinstance(names, list) or not isinstance(settings, list) or len(names) != len(settings) or not names:
        raise UserError(f"IFEval's metrics read {_NAMES} and {_SETTINGS}: two lists of one length in every record.")
    return [
        (str(name), {key: value for key, value in (own or {}).items() if value is not None})
        for name, own in zip(names, settings, strict=True)
    ]
