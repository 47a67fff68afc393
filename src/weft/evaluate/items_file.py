"""The file of an evaluation's items while it runs: it grows with every answer, and is whole at the end."""

from __future__ import annotations

from pathlib import Path

from weft.errors import UserError
from weft.evaluate.results import ITEMS, SUMMARY, Item, Results
from weft.files.whole import append_line, make_folder, remove, write_whole

ANSWERS = "answers"


class ItemsFile:
    """The results' folder of one evaluation. What lies there of another one is replaced when the first answer comes;
    the answers themselves stay in the folder ``answers`` beside, from which they are taken again.

    Args:
        folder: The folder; None: nothing is written.

    Raises:
        UserError: The folder holds something else.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._begun = False
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is no folder.")
        known = {ITEMS, SUMMARY, ANSWERS}
        strange = sorted(one.name for one in folder.iterdir() if one.name not in known) if folder.is_dir() else []
        if strange and not (folder / SUMMARY).is_file() and not (folder / ITEMS).is_file():
            raise UserError(f"--output {folder} holds other files ({strange[0]}); give a folder of its own.")

    @property
    def answers(self) -> Path | None:
        """Where answers are kept."""
        return None if self.folder is None else self.folder / ANSWERS

    def add(self, item: Item) -> None:
        """Put an item at the end.

        Raises:
            WriteError: The machine refuses to write.
        """
        if self.folder is None:
            return
        if not self._begun:
            make_folder(self.folder)
            remove(self.folder / SUMMARY)
            write_whole(self.folder / ITEMS, "")
            self._begun = True
        append_line(self.folder / ITEMS, item.line().rstrip("\n"))

    def close(self, results: Results) -> None:
        """Write all results, each file whole.

        Raises:
            WriteError: The machine refuses to write.
        """
        if self.folder is not None:
            make_folder(self.folder)
            results.write(self.folder)
