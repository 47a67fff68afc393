"""What a method has decided for a base is said before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOTE = "this llama model has no bias terms, so bitfit gives it 14 new ones"


def test_preview_and_train_say_what_bitfit_adds(
    weft: Callable[..., Any], tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    words = ["--model", tiny_llama_dir, "--data", tiny_data]
    page = tmp_path / "page.html"
    assert f"bitfit: {NOTE}" in weft("preview", *words, "method=bitfit", "--samples", 0, "--html", page).out
    assert f"bitfit: {NOTE}" in page.read_text()
    notes = json.loads(weft("preview", *words, "method=[bitfit, lora]", "--json").out)["data"][0]["notes"]
    assert list(notes) == ["bitfit"]
    run = weft("train", *words, "--method", "bitfit", "steps=1", "--output-dir", "one")
    assert f"bitfit: {NOTE}" in run.out.partition("\n\n")[0]  # above the table of results
    job = json.loads(weft("train", *words, "--method", "bitfit", "steps=1", "--output-dir", "two", "--json").out)
    assert NOTE in job["jobs"][0]["note"]
