"""How an exercise becomes tokens: as plain text by lm_eval's conventions, or as a conversation of the chat template."""

from __future__ import annotations

from collections.abc import Sequence

from weft.data import Message, Prompt
from weft.errors import UserError
from weft.evaluate.encoding import encode, split
from weft.evaluate.questions import Continuation
from weft.evaluate.scoring import room
from weft.evaluate.tasks import Exercise, Frame, Task
from weft.generation.target import Target
from weft.models.token_rows import check_rows

_LONGEST = 8  # exercises that are tried before anything is computed: those with the most characters


class Prompter:
    """Makes the prompts of one task for one target.

    Raises:
        UserError: The task needs a chat template, and none is known.
    """

    def __init__(self, target: Target, task: Task) -> None:
        self.target, self.task = target, task
        self._last: list[tuple[Exercise, Frame, tuple[str, ...], Prompt]] = []
        if task.settings.chat and target.renderer.template.origin == "fallback":
            raise UserError(
                f"task {task.name} asks through the chat template, and {target.base.name} has none: a score by another "
                "one would say nothing of it. Give --chat-template, or ask plainly with --no-apply-chat-template."
            )

    def prompt(self, frame: Frame, exercise: Exercise, said: Sequence[str] = ()) -> Prompt:
        """The ids and slots of a question; ``said`` are the answers to its turns before this one.

        Raises:
            UserError: The template refuses it.
        """
        said = tuple(said)
        if self._last and self._last[0][0] is not exercise:
            self._last = []
        for _, known, before, prompt in self._last:  # another adapter is asked the same
            if before == said and known == frame:
                return prompt
        made = self._made(frame, exercise, said)
        self._last.append((exercise, frame, said, made))
        return made

    def _made(self, frame: Frame, exercise: Exercise, said: Sequence[str]) -> Prompt:
        tokenizer = self.target.renderer.tokenizer
        if self.task.settings.chat:
            turns = self.messages(frame, exercise, said)
            kind = self.target.adapters.architecture.task
            made = self.target.renderer.prompt(turns, task=kind, source=exercise.source)
        else:
            made = Prompt(encode(tokenizer, self.text(frame, exercise, said)))
        check_rows(made.ids, self.target.base.token_rows, tokenizer, exercise.source)
        return made

    def messages(self, frame: Frame, exercise: Exercise, said: Sequence[str] = ()) -> list[Message]:
        """The conversation: examples are turns of it, and the instruction is the beginning of the first question."""
        pairs = [(one.prompts[0], one.answer) for one in frame.examples]
        pairs += list(zip(exercise.prompts, said, strict=False))
        questions = [question for question, _ in pairs] + [exercise.prompts[len(said)]]
        questions[0] = (f"{frame.instruction}\n\n" if frame.instruction else "") + questions[0]
        turns = [Message("system", frame.system)] if frame.system else []
        for question, (_, answer) in zip(questions, pairs, strict=False):
            turns += [Message("user", question), Message("assistant", answer)]
        return [*turns, Message("user", questions[-1])]

    def text(self, frame: Frame, exercise: Exercise, said: Sequence[str] = ()) -> str:
        """The plain text: the instruction, the examples with their answers, the question."""
        settings = self.task.settings
        between = settings.few_shot.delimiter
        pairs = [(one.prompts[0], one.answer) for one in frame.examples]
        pairs += list(zip(exercise.prompts, said, strict=False))
        before = [f"{question}{settings.target_delimiter}{answer}" for question, answer in pairs]
        parts = [frame.instruction] if frame.instruction else []
        return between.join([*parts, *before, exercise.prompts[len(said)]])

    def continuations(self, frame: Frame, exercise: Exercise) -> list[Continuation]:
        """The choices of an exercise after its question.

        Raises:
            UserError: A choice adds no token.
        """
        tokenizer, settings = self.target.renderer.tokenizer, self.task.settings
        if settings.chat:
            prompt = self.prompt(frame, exercise)
            encoded = [encode(tokenizer, choice, special=False) for choice in exercise.choices]
            return [Continuation(prompt.ids, ids, prompt.slots) for ids in encoded]
        context, apart = self.text(frame, exercise), self.target.adapters.layout.writes_apart
        known: dict[str, list[int]] = {}

        def once(text: str) -> list[int]:
            if text not in known:
                known[text] = encode(tokenizer, text)
            return known[text]

        return [
            split(tokenizer, context, settings.target_delimiter + choice, apart=apart, encoded=once)
            for choice in exercise.choices
        ]

    def check_length(self, adapter: str | None, exercise: Exercise, frame: Frame, read: int, written: int) -> None:
        """Refuse a question that leaves no room for its answer.

        Args:
            read, written: tokens of the question with its examples, and of the answer.

        Raises:
            UserError: It is one.
        """
        limit = room(self.target.adapters, adapter)
        apart = self.target.adapters.layout.writes_apart
        if limit is None or (max(read, written) if apart else read + written) <= limit:
            return
        few = f" with {len(frame.examples)} examples" if frame.examples else ""
        who = "the base" if adapter is None else f"adapter '{adapter}'"
        todo = ["a smaller --num-fewshot"] * bool(frame.examples)
        todo += ["a smaller max_new_tokens (--max-new-tokens)"] * (self.task.settings.kind == "generation")
        raise UserError(
            f"{exercise.source}: task {self.task.name}: the question{few} takes {read:,} tokens and the answer up to "
            f"{written:,}; {who} reads {limit:,} at once. Give {' or '.join(todo) or 'shorter questions'}."
        )

    def longest(self, exercises: Sequence[Exercise], frame_of: Sequence[Frame]) -> list[tuple[Exercise, Frame]]:
        """The exercises with the most characters, each with its frame: those that would not fit."""
        pairs = list(zip(exercises, frame_of, strict=True))

        def size(pair: tuple[Exercise, Frame]) -> int:
            exercise, frame = pair
            before = sum(len(one.prompts[0]) + len(one.answer) for one in frame.examples)
            return before + len(exercise.prompts[0]) + max(map(len, exercise.choices), default=0)

        return sorted(pairs, key=size, reverse=True)[:_LONGEST]
