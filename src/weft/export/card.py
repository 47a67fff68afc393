"""The model card (``README.md``): written from what a run and an adapter's folder record, and from nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from weft.data.provenance import file_names
from weft.export.format import Written
from weft.files import adapter_folder as files
from weft.files.run_folder import RUN_FILE, read_metrics, run_of
from weft.files.tensors import digest
from weft.files.whole import sha256_of
from weft.foreign import expect, read_json
from weft.paths import is_hub_id
from weft.version import __version__

CARD = "README.md"
# Settings of a method that say where and how much; the others are written where they are set.
_UNSET: tuple[object, ...] = (None, False, [], {}, "", 0, 0.0, "none")
_JOB_KEYS = ("objective", "steps", "epochs", "batch_size", "batch_tokens", "learning_rate", "lr_scheduler_type",
             "optimizer", "seed")  # fmt: skip
_LIBRARIES = {"peft": "peft", "gguf": "gguf", "gguf-lora": "gguf", "ollama": "gguf"}


@dataclass(frozen=True)
class Facts:
    """What a card tells of an adapter.

    Attributes:
        base: the base's name, without a path of this machine.
        own: the adapter's ``weft.json``; empty for a folder of another program.
        job: the settings of its job in its run.
        figures: the last figures that the run logged for it.
        tensors: a hash of all its tensors.
    """

    name: str
    method: str
    base: str
    _: KW_ONLY
    own: Mapping[str, Any]
    job: Mapping[str, Any]
    figures: Mapping[str, float]
    tensors: str


def facts_of(adapter: Path, base: str) -> Facts:
    """What an adapter's folder, and the run that it lies in, record.

    Raises:
        UserError: A file is damaged.
    """
    own = files.read_own(adapter)
    run, name = run_of(adapter), adapter.resolve().name
    job: Mapping[str, Any] = {}
    figures: dict[str, float] = {}
    if run is not None:
        job = next((one for one in _jobs(run) if one.get("name") == name), {})
        for row in read_metrics(run):
            if row.get("job") == name:
                figures |= {k: row[k] for k in ("loss", "eval_loss", "step") if isinstance(row.get(k), (int, float))}
    parts = own.get("parts")
    folders = [adapter / str(part) for part in parts] if isinstance(parts, list) else []
    methods = [str(files.read_own(part).get("method")) for part in folders] or [str(own.get("method") or "")]
    if not own:
        methods = [str(read_json(adapter / files.CONFIG).get("peft_type", "")).lower()]
    return Facts(
        name,
        "+".join(methods),
        base if is_hub_id(base) else Path(base).name,
        own=own,
        job=job,
        figures=figures,
        tensors=hash_of_tensors(adapter),
    )


def _jobs(run: Path) -> list[dict[str, Any]]:
    where = f"{run / RUN_FILE}: config"
    config = expect(read_json(run / RUN_FILE).get("config", {}), dict, where)
    return [expect(one, dict, f"{where}.jobs") for one in expect(config.get("jobs", []), list, f"{where}.jobs")]


def hash_of_tensors(folder: Path) -> str:
    """One SHA-256 of all tensors in a folder: of each one's file, name and own hash, in order."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        for key, tensor in sorted(files.read_tensors(path).items()):
            found.update(f"{path.relative_to(folder)} {key} {digest(tensor)}\n".encode())
    return found.hexdigest()


def card(kind: str, name: str, base: str, facts: Facts | None, written: Written, part: Path) -> str:
    """The text of the card for what lies in the folder ``part``."""
    head = {"base_model": base, "library_name": _LIBRARIES.get(kind, kind), "tags": ["weft", *_tags(facts)]}
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()), "---", ""]
    lines += [f"# {name}", ""]
    if facts is None:
        lines += [f"The model {base}, exported by Weft {__version__} ({kind}).", ""]
    else:
        lines += [f"An adapter of the method {facts.method} over {base}, exported by Weft {__version__} ({kind}).", ""]
        lines += [*_data(facts), *_training(facts)]
    lines += ["## How to load it", "", *_how(written), ""]
    if written.lines:
        lines += ["## What was checked", "", *(f"- {line}" for line in written.lines), ""]
    lines += [*(f"- {note}" for note in written.notes), *([""] if written.notes else [])]
    lines += ["## Hashes", ""]
    if facts is not None:
        lines.append(f"- the adapter's tensors (names and values): `{facts.tensors}`")
        base_hash = (facts.own.get("base") or {}).get("sha256_of_small_tensors")
        lines += [f"- the base's small tensors: `{base_hash}`"] if base_hash else []
    lines += [f"- {path.name}: `{sha256_of(path)}`" for path in sorted(part.iterdir()) if _heavy(path)]
    return "\n".join(lines) + "\n"


def _heavy(path: Path) -> bool:
    return path.suffix in (".safetensors", ".gguf")


def _tags(facts: Facts | None) -> list[str]:
    return [] if facts is None else [one for one in facts.method.split("+") if one]


def _how(written: Written) -> list[str]:
    if written.loaders:
        return [f"- {one.line()}" for one in written.loaders]
    return ["```", *written.commands, "```"]


def _data(facts: Facts) -> list[str]:
    data = facts.own.get("data")
    if not data:
        return ["## Data", "", "The folder does not say what it was trained on.", ""]
    settings = file_names(data.get("settings") or {})
    rows = {"data": settings.get("data"), "eval_data": settings.get("eval_data"), "records": data.get("records"),
            "eval_records": data.get("eval_records"), "train_on": settings.get("train_on"),
            "max_length": settings.get("max_length"), "template_from": data.get("template_from"),
            "SHA-256 of the tokenised data": data.get("sha256")}  # fmt: skip
    lines = ["## Data", "", *_table(rows)]
    for parent in data.get("parents") or ():
        lines.append(f"- made of {json.dumps(file_names(parent), ensure_ascii=False, sort_keys=True)}")
    template = data.get("chat_template")
    if isinstance(template, str):
        lines += ["", "Chat template of the training:", "", "```jinja", template, "```"]
    return [*lines, ""]


def _training(facts: Facts) -> list[str]:
    config = facts.own.get("config") or {}
    set_ones = {key: value for key, value in sorted(config.items()) if value not in _UNSET}
    job = {key: facts.job.get(key) for key in _JOB_KEYS if facts.job.get(key) not in (None, {})}
    kept = facts.own.get("base") or {}
    job |= {"base kept in": ", ".join(str(v) for v in (kept.get("dtype"), kept.get("quantization")) if v)}
    lines = ["## Method", "", *_table({"method": facts.method} | set_ones), ""]
    lines += ["## Training", "", *_table(job), ""]
    if facts.figures:
        rows = {"step": facts.figures.get("step"), "last training loss": facts.figures.get("loss"),
                "last evaluation loss": facts.figures.get("eval_loss")}  # fmt: skip
        lines += ["## Figures", "", *_table(rows), ""]
    return lines


def _table(rows: Mapping[str, object]) -> list[str]:
    shown = {key: _cell(value) for key, value in rows.items() if value not in (None, "", [], {})}
    return ["| | |", "|---|---|", *(f"| {key} | {text} |" for key, text in shown.items())]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", " ")
