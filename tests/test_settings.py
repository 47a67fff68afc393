"""Settings travel whole: a new key touches its field and the code that honours it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from weft.cli.options import meaning
from weft.data.settings import DataSettings, free_keys
from weft.training.settings import RunConfig

SOURCE = Path(__file__).parent.parent / "src" / "weft"
KEYS = frozenset(RunConfig.model_fields)
# Functions whose parameters are named as keys, though there is no configuration: what people call by themselves.
OPEN_TO_ALL = {"load_samples", "load_base", "sketch_base", "open_target"}


def unpacked(tree: ast.AST, keys: frozenset[str] = KEYS) -> Iterator[tuple[int, str]]:
    """(line, what) of calls that hand two keys on one by one, and of functions that take three."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = [k.arg for k in node.keywords if isinstance(k.value, ast.Attribute) and k.value.attr == k.arg]
            if len(found := keys.intersection(given)) > 1:
                yield node.lineno, f"{ast.unparse(node.func)} is given {', '.join(sorted(found))}"
        elif isinstance(node, ast.FunctionDef):
            taken = {one.arg for one in (*node.args.args, *node.args.kwonlyargs)}
            if len(found := keys & taken) > 2:
                yield node.lineno, f"{node.name} takes {', '.join(sorted(found))}"


def test_data_keys_travel_together() -> None:
    keys = frozenset(DataSettings.model_fields) - {"data", "limit", "columns", "audit"}  # words with other meanings
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {what}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line, what in unpacked(ast.parse(path.read_text()), keys)
        if what.split()[0] not in OPEN_TO_ALL
    ]
    assert found == [], "hand the settings on whole"


@pytest.mark.parametrize(
    "source",
    [
        "Renderer(tokenizer, train_on=config.train_on, max_length=config.max_length)",
        "def read(path, *, train_on, max_length, truncation): ...",
    ],
)
def test_the_check_sees(source: str) -> None:
    assert list(unpacked(ast.parse(source)))


@pytest.mark.parametrize("key", ["model", "data", "output_dir", "shape", "resume", "overwrite_output_dir"])
def test_help_says_what_the_field_says(key: str) -> None:
    said = (RunConfig.model_fields[key].description or "").split(" ([")[0].replace("`", "")
    assert said.casefold() in meaning(key).casefold()


def test_what_may_change_on_resumption() -> None:
    assert free_keys(RunConfig) == {
        "output_dir", "overwrite_output_dir", "resume", "logging_steps", "save_steps", "save_total_limit", "threads",
        "verify_packing", "data_workers", "bad_records_file", "audit", "callbacks", "check_disk_space",
        "offload_activations", "offload_folder", "check_memory", "report_to",
    }  # fmt: skip
