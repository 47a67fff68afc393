"""What training left in a run's folder: the jobs, their losses over the steps, their size, time and speed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from weft.errors import UserError
from weft.files.adapter_folder import OWN_CONFIG
from weft.files.run_folder import RUN_FILE, read_metrics
from weft.files.whole import weights_bytes
from weft.foreign import check_safetensors, expect, read_json

Curve = tuple[tuple[int, float], ...]

# Of a job's settings, those that a reader asks for first.
_SHOWN = ("objective", "steps", "epochs", "batch_size", "batch_tokens", "learning_rate", "lr_scheduler_type",
          "optimizer", "weight_decay", "seed")  # fmt: skip
_TRAINED = "parameter."  # before the names of a checkpoint's trained tensors
_EVAL, _LOSS = "eval_", "loss"


@dataclass(frozen=True)
class JobRecord:
    """One job of a run.

    Attributes:
        settings: of its method and its training.
        parameters: how many were trained; ``bytes``: of its adapter's folder; None where the folder does not say.
        seconds, tokens_per_second: of the pass that all jobs share; ``peak_bytes``: of memory, likewise.
        train, evals: losses by step; ``evals`` has one curve for each set, '' for a set without a name.
        done: its adapter is there.
        template, stops: what its training rendered conversations with, and the special tokens of its tokenizer.
    """

    name: str
    method: str
    settings: Mapping[str, object]
    _: KW_ONLY
    parameters: int | None
    bytes: int | None
    seconds: float | None
    tokens_per_second: float | None
    peak_bytes: int | None
    train: Curve
    evals: Mapping[str, Curve]
    done: bool
    template: str | None
    stops: str | None


@dataclass(frozen=True)
class RunRecord:
    """A run: the base that it names, and its jobs."""

    path: Path
    label: str
    model: str
    _: KW_ONLY
    settings: Mapping[str, object]
    jobs: tuple[JobRecord, ...]


def read_run(path: Path, label: str) -> RunRecord:
    """What the run in a folder has left.

    Raises:
        UserError: A file of it is damaged.
    """
    where = f"{path / RUN_FILE}: config"
    config = expect(read_json(path / RUN_FILE).get("config", {}), dict, where)
    rows: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in read_metrics(path):
        rows[str(row.get("job"))].append(row)
    jobs = [expect(one, dict, f"{where}.jobs") for one in expect(config.get("jobs", []), list, f"{where}.jobs")]
    told = {key: config[key] for key in ("data", "eval_data", "chat_template", "dtype", "quantization", "max_length")
            if config.get(key) is not None}  # fmt: skip
    records = tuple(_job(path, job, rows[str(job.get("name"))]) for job in jobs)
    return RunRecord(path, label, str(config.get("model", "")), settings=told, jobs=records)


def _job(run: Path, job: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> JobRecord:
    name, folder = str(job.get("name")), run / "adapters" / str(job.get("name"))
    steps = [row for row in rows if row.get("event") == "step"]
    last = steps[-1] if steps else {}
    speed, tokens, memory = (_number(last.get(key)) for key in ("tokens_per_second", "tokens", "memory_gb"))
    data = _data(folder)
    special = (data.get("tokenizer") or {}).get("special_tokens") or {}
    settings = {**(job.get("method_settings") or {}), **{key: job[key] for key in _SHOWN if job.get(key) is not None}}
    return JobRecord(
        name,
        str(job.get("method")),
        settings,
        parameters=_trained(run, name),
        bytes=weights_bytes(folder) if folder.is_dir() else None,
        seconds=tokens / speed if tokens and speed else None,
        tokens_per_second=speed,
        peak_bytes=int(memory * 1e9) if memory else None,
        train=_curve(steps, _LOSS),
        evals=_evals([row for row in rows if row.get("event") == "eval"]),
        done=folder.is_dir(),
        template=data.get("chat_template"),
        stops=special.get("eos_token"),
    )


def _data(folder: Path) -> Mapping[str, Any]:
    """How the training of an adapter read its data, as its folder says."""
    path = folder / OWN_CONFIG
    found = read_json(path).get("data") if path.is_file() else None
    return expect(found, dict, f"{path}: data") if found else {}


def _trained(run: Path, job: str) -> int | None:
    """The numbers that a job trained, from the head of the newest checkpoint's file; None if there is none."""
    for path in sorted((run / "checkpoints").glob(f"step-*/{job}.safetensors"), reverse=True):
        try:
            head = check_safetensors(path)
        except UserError:
            continue  # the one before tells it too
        shapes = [one.get("shape") for key, one in head.items() if key.startswith(_TRAINED) and isinstance(one, dict)]
        return sum(_product(shape) for shape in shapes if isinstance(shape, list))
    return None


def _product(shape: list[Any]) -> int:
    size = 1
    for side in shape:
        size *= int(side)
    return size


def _evals(rows: list[Mapping[str, Any]]) -> dict[str, Curve]:
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(_EVAL) and key.endswith(_LOSS))
    return {key[len(_EVAL) : -len(_LOSS)].rstrip("_"): _curve(rows, key) for key in keys}


def _curve(rows: list[Mapping[str, Any]], key: str) -> Curve:
    """(step, value) of the rows that have a number there; an overflow was logged as null."""
    found = ((row.get("step"), _number(row.get(key))) for row in rows)
    return tuple((step, value) for step, value in found if isinstance(step, int) and value is not None)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
