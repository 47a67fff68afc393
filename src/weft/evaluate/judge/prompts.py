"""The prompts of a judge: Jinja files, ours or a user's copies of them, rendered in the sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from weft.data.rendering.sandbox import render_template
from weft.errors import UserError, check_word, reason_of
from weft.files.whole import make_folder, new_folder, write_text
from weft.foreign import read_text

Language = Literal["en", "zh"]
LANGUAGES = ("en", "zh")
_FOLDER = Path(__file__).parent / "prompts"
_KINDS = ("compare", "score")


@dataclass(frozen=True)
class JudgePrompts:
    """The templates by which a judge is asked. ``places`` says where each is from, for messages."""

    compare: str
    score: str
    places: Mapping[str, str]

    @classmethod
    def read(cls, language: str = "en", folder: Path | None = None) -> Self:
        """Ours in a language; a file of the same name in ``folder`` takes its place.

        Raises:
            UserError: The language is unknown, or the folder has no such file.
        """
        check_word("the language of the judge's prompts", language, LANGUAGES)
        found, places = {}, {}
        for kind in _KINDS:
            name = f"{kind}.{language}.jinja"
            own = None if folder is None else folder / name
            places[kind] = str(own) if own is not None and own.is_file() else name
            found[kind] = read_text(own if own is not None and own.is_file() else _FOLDER / name)
        if folder is not None and not any(place.startswith(str(folder)) for place in places.values()):
            names = " or ".join(f"{kind}.{language}.jinja" for kind in _KINDS)
            raise UserError(f"{folder} holds no prompt of a judge: expected {names}. --copy-templates writes ours.")
        return cls(found["compare"], found["score"], places)

    def render(self, kind: Literal["compare", "score"], variables: Mapping[str, object]) -> str:
        """A prompt.

        Raises:
            UserError: The template fails or reaches a limit of the sandbox, or writes nothing.
        """
        try:
            text = render_template(getattr(self, kind), variables)
        except Exception as error:  # a template raises whatever it likes
            number = getattr(error, "lineno", None)
            line = f":{number}" if number else ""
            raise UserError(f"{self.places[kind]}{line}: the prompt cannot be rendered: {reason_of(error)}.") from None
        if not text.strip():
            raise UserError(f"{self.places[kind]}: the prompt is empty.")
        return text


def copy_prompts(folder: Path) -> list[str]:
    """Write our templates into a new folder; returns their names.

    Raises:
        UserError: The folder is there already.
        WriteError: The machine refuses to write.
    """
    names = sorted(path.name for path in _FOLDER.glob("*.jinja"))
    with new_folder(folder) as part:
        make_folder(part)
        for name in names:
            write_text(part / name, read_text(_FOLDER / name))
    return names
