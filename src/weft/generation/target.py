"""A target that is open: a base with adapters, and how each of them is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Self

from weft.adapters import Adapters
from weft.core import adapters as core
from weft.data import Message, Prompt, Renderer
from weft.data.formats.turns import Turn
from weft.data.pipeline import Recipe
from weft.data.problems import Problems
from weft.data.queries import (
    ClassQueryRecipe,
    Query,
    QueryRecipe,
    given_queries,
    read_queries,
    reading_of,
    settings_of,
)
from weft.data.reading.rows import Record
from weft.data.rendering.drafts import RenderSettings
from weft.data.settings import part
from weft.errors import UserError, nearest
from weft.generation.checks import check_writes
from weft.generation.engine import Engine
from weft.generation.limits import Limits
from weft.methods.dense import how_kept
from weft.models import Base
from weft.models.token_rows import check_rows

BASE = "base"
# The limit of an answer where neither the user nor the model sets one.
_DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Target:
    """A base with adapters, and the renderer that their training used.

    Attributes:
        names: the adapters, in the run's order; empty for a plain model.
        others: the adapters of the run that are not loaded.
        data_settings: how each adapter's training read its data, as far as that is known.
        notes: what the user should know, such as that an adapter comes from a checkpoint.
    """

    base: Base
    adapters: Adapters
    renderer: Renderer
    _: KW_ONLY
    names: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    data_settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends an answer: the tokenizer's, the model's and the renderer's."""
        return stop_ids(self.adapters, self.renderer)

    def engine(self, limits: Limits = Limits()) -> Engine:
        """An engine that answers with texts, as whoever talks to the target wants them. Close it after use."""
        return open_engine(self.adapters, self.renderer, limits)

    def adapter(self, name: str | None) -> str | None:
        """The adapter's name as ``Request`` wants it; ``base`` (unless an adapter is called so) and None are the base.

        Raises:
            UserError: there is no such adapter.
        """
        if name is None or (name == BASE and name not in self.names):
            return None
        if name not in self.names:
            known = ", ".join(dict.fromkeys((*self.names, BASE)))
            if name in self.others:
                raise UserError(
                    f"adapter '{name}' is in the run, but not loaded: --adapter chose {known}. Name it there, too."
                )
            raise UserError(f"no adapter named '{name}'.{nearest(name, [*self.names, BASE])} There are: {known}.")
        return name

    def prompt(self, prompt: str | Sequence[Turn], *, raw: bool = False) -> Prompt:
        """Ids and slots of a prompt: a conversation, or a text that is one question (``raw``: to be continued)."""
        if isinstance(prompt, str) and not raw:
            return self.prompt([Message("user", prompt)])
        if isinstance(prompt, str):
            made = Prompt(list(self.renderer.tokenizer(prompt, verbose=False)["input_ids"]))
        else:
            made = self.renderer.prompt(prompt, task=self.adapters.architecture.task)
        check_rows(made.ids, self.base.token_rows, self.base.tokenizer, "the prompt")
        return made

    def prompt_ids(self, prompt: str | Sequence[Turn], *, raw: bool = False) -> list[int]:
        """``prompt(...).ids``, for adapters that need no slots."""
        return self.prompt(prompt, raw=raw).ids

    def queries(
        self,
        source: Path | Sequence[str] | Sequence[Record],
        adapter: str | None,
        *,
        problems: Problems | None = None,
        system: str | None = None,
        raw: bool = False,
    ) -> list[Query]:
        """The questions of a file, of texts or of records, read and rendered as in the training of ``adapter``.

        Args:
            source: The path of a file, texts that the user gave, or records that were read already.
            adapter: The adapter that is asked; None: the base, whose prompts are those of the first adapter.
            problems: Takes the bad records of a file, where training left out its own; default: they are logged.
            system: A message before each question.
            raw: Whether texts are to be continued as they stand.

        Raises:
            UserError: A record cannot be asked; it is about the first one.
        """
        given = self.data_settings.get(adapter or next(iter(self.names), ""), {})
        settings, known = settings_of(given), self.adapters.architecture
        recipe: Recipe
        if adapter is not None and not self.adapters.head(adapter).writes:
            cut = settings.truncation in ("left", "right", "middle")
            limits = {"max_length": settings.max_length or known.max_length if cut else None, "chat_template": None}
            columns, label = given.get("text_columns"), given.get("label_column")
            recipe = ClassQueryRecipe(
                renderer=Renderer(self.renderer.tokenizer, part(RenderSettings, settings, **limits)),
                token_rows=self.base.token_rows,
                labels=self.adapters[adapter].head.labels,
                text_columns=[str(name) for name in columns] if isinstance(columns, (list, tuple)) else None,
                label_column=label if isinstance(label, str) else None,
                encoder=not known.writes,
            )
        else:
            recipe = QueryRecipe(
                renderer=self.renderer,
                token_rows=self.base.token_rows,
                settings=reading_of(source, settings) if isinstance(source, Path) else settings,
                task=known.task,
                system=system,
                raw=raw,
            )
        if not isinstance(source, Path):
            return given_queries(source, recipe, "--prompt")
        taken = problems if problems is not None else Problems("skip")
        found = read_queries(source, recipe, taken if settings.on_bad_record != "error" else None)
        if problems is None:
            taken.check(str(source))
        return found

    def room(
        self, length: int, adapter: str | None, wanted: int | None, *, what: str = "the prompt", clip: bool = False
    ) -> int:
        """How many tokens may follow a prompt of ``length``: ``wanted``, or what is usual and fits.

        Raises:
            UserError: the prompt leaves no room, or less than ``wanted`` (unless ``clip``).
        """
        limit = self.adapters.architecture.max_length
        if limit is None:
            return wanted or _DEFAULT_NEW_TOKENS
        learned = 0 if adapter is None else self.adapters[adapter].num_learned_tokens
        left = limit - length - learned
        if left < (1 if clip or wanted is None else wanted):
            taken = f"{length} tokens" + f" and the adapter's {learned}" * bool(learned)
            asked = f" (max_new_tokens: {wanted})" * (wanted is not None)
            raise UserError(f"{what}: {taken} of the model's {limit} positions leave no room for an answer{asked}.")
        return min(wanted or _DEFAULT_NEW_TOKENS, left)

    def summary(self) -> str:
        """One line on what was loaded: base, adapters, how the base is kept, where it is, and the chat template."""
        kept = how_kept(self.base.model, self.adapters.dtype)
        how = ", ".join(str(part) for part in (kept["dtype"], kept["quantization"], self.adapters.device) if part)
        template = {"own": "the tokenizer's", "asked": "the one of training or given", "fallback": "plain headings"}
        return (
            f"base {self.base.name} ({self.adapters.architecture.model_type}, {how}); adapters: "
            f"{', '.join(self.names) or 'none'}; chat template: {template[self.renderer.template.origin]}"
        )

    def close(self) -> None:
        """Take the adapters off; the model is again the one that was loaded."""
        self.adapters.close()


def open_engine(adapters: core.Adapters, renderer: Renderer, limits: Limits = Limits()) -> Engine:
    """An engine whose answers are texts, and end where those of ``renderer``'s conversations do.

    Of an encoder it answers nothing, and says so when it is asked.
    """
    ends = stop_ids(adapters, renderer) if adapters.architecture.writes else frozenset[int]()
    return Engine(adapters, tokenizer=renderer.tokenizer, stop_ids=ends, limits=limits)


def stop_ids(adapters: core.Adapters, renderer: Renderer) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's, the model's and the renderer's.

    Raises:
        UserError: The base writes no text.
    """
    check_writes(adapters, None)
    eos = getattr(getattr(adapters.model, "generation_config", None), "eos_token_id", None)
    ids = eos if isinstance(eos, list) else [eos]
    return frozenset(i for i in (*ids, renderer.tokenizer.eos_token_id, renderer.eos_token_id) if isinstance(i, int))
