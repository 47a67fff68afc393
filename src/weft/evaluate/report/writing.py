"""A report's files: one page that stands alone, the same as Markdown and JSON, and the plots as PNG."""

from __future__ import annotations

import json
from pathlib import Path

from weft.evaluate.report.markdown import markdown
from weft.evaluate.report.page import page
from weft.evaluate.report.pictures import FIGURES, LOSSES, TRADE, losses_name, pictures
from weft.evaluate.report.report import Report
from weft.files.whole import make_folder, refilled_folder, write_whole
from weft.numbers import finite

PAGE, TEXT, DATA = "report.html", "report.md", "report.json"
_RUNS = 64  # of which an older report may have left losses


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write all files of a report into a folder, where other files stay. Either all are written or none.

    Raises:
        UserError: ``folder`` is a file.
        WriteError: The machine refuses to write there.
    """
    drawn = dict(pictures(report))
    older = {FIGURES, TRADE, LOSSES, *map(losses_name, range(1, _RUNS))}
    with refilled_folder(folder, drop=older) as part:
        make_folder(part)
        for name, content in drawn.items():
            write_whole(part / name, content)
        data = json.dumps(finite(report.summary()), ensure_ascii=False, indent=1) + "\n"
        for name, text in ((TEXT, markdown(report, list(drawn))), (DATA, data), (PAGE, page(report))):
            write_whole(part / name, text.encode(errors="replace"))
    return [folder / name for name in (PAGE, TEXT, DATA, *drawn)]
