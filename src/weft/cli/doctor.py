"""``weft doctor``: tries which parts of this machine and installation work."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from weft.cli import common, options
from weft.machine import memory

OK, ABSENT, FAILED = "ok", "absent", "failed"
_NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "pydantic", "numpy")
_USEFUL = ("peft", "bitsandbytes", "accelerate")
_VARIABLES = (
    "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
)  # fmt: skip
# These make bfloat16 fast on a CPU; /proc/cpuinfo names them so.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    section: str
    name: str
    status: str
    detail: str = ""


def doctor(
    as_json: options.Json = False,
) -> int:
    """Check this installation: versions, devices, number formats, memory, embedded models, every method.

    Ends with 0 if nothing failed, else with 2. What is absent is not needed for the rest to work.
    """
    checks = list(run_checks())
    failed = [check for check in checks if check.status == FAILED]
    if as_json:
        common.print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        _show(checks)
    return common.USAGE if failed else common.DONE


def run_checks() -> Iterator[Check]:
    """Run all checks; none raises."""
    for section in (_versions, _devices, _dtypes, _machine, _settings, _embedded, _methods):
        try:
            yield from section()
        except Exception as error:  # the report is for checks that cannot even run
            yield Check(section.__name__.strip("_"), "check", FAILED, _short(error))


def _try(section: str, name: str, attempt: Callable[[], str]) -> Check:
    try:
        return Check(section, name, OK, attempt())
    except Exception as error:  # the user is to see it in the table, whatever it is
        return Check(section, name, FAILED, _short(error))


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _versions() -> Iterator[Check]:
    from importlib import metadata

    import weft

    yield Check("versions", "weft", OK, weft.__version__)
    yield Check("versions", "python", OK, platform.python_version())
    for name in (*_NEEDED, *_USEFUL):
        try:
            yield Check("versions", name, OK, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check("versions", name, FAILED if name in _NEEDED else ABSENT)


def _devices() -> Iterator[Check]:
    import torch

    yield Check("devices", "cpu", OK, f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        yield Check("devices", "cuda", ABSENT)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{common.human_size(free)} of {common.human_size(total)} free"
        yield Check("devices", f"cuda:{index}", OK, f"{torch.cuda.get_device_name(index)}, {memory}")


def _dtypes() -> Iterator[Check]:
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for name in ("float32", "bfloat16", "float16"):
            yield _try("dtypes", f"{name} on {device}", partial(_product, device, name))


def _product(device: str, dtype: str) -> str:
    """Compare a product and its gradient with float64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    x = exact.to(device, getattr(torch, dtype)).requires_grad_()
    y = x @ x
    y.sum().backward()
    assert x.grad is not None
    error = float((y.detach().cpu().double() - exact @ exact).abs().max() / (exact @ exact).abs().max())
    if not error < 0.05 or not bool(x.grad.isfinite().all()):
        raise ValueError(f"a 64 x 64 product is off by {error:.1%}")
    return "product and gradient"


def _machine() -> Iterator[Check]:
    yield Check("machine", "system", OK, f"{platform.system()} {platform.release()}, {platform.machine()}")
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        line = next((text for text in cpuinfo.read_text().splitlines() if text.startswith(("flags", "Features"))), "")
        for flag in _CPU_FLAGS:
            yield Check("machine", flag, OK if flag in line.split() else ABSENT)
    yield Check("machine", "cores", OK, f"{common.cores()}")
    if (known := memory()) is not None:
        free, total = map(common.human_size, known)
        yield Check("machine", "memory", OK, f"{free} of {total} free")
    disk = shutil.disk_usage(".")
    yield Check("machine", "disk here", OK, f"{common.human_size(disk.free)} of {common.human_size(disk.total)} free")


def _settings() -> Iterator[Check]:
    for name in _VARIABLES:
        value = os.environ.get(name)
        yield Check("settings", name, ABSENT if value is None else OK, value or "")


def _embedded() -> Iterator[Check]:
    from weft.assets import EMBEDDED_MODELS, model_path

    for name in EMBEDDED_MODELS:
        if not (model_path(name) / "config.json").is_file():
            yield Check("embedded", name, ABSENT)
        else:
            yield _try("embedded", name, partial(_load, name))


def _load(name: str) -> str:
    from weft.models import load_base

    base = load_base(name, device="cpu")
    parameters = sum(p.numel() for p in base.model.parameters())
    return f"{parameters:,} parameters, {len(base.tokenizer)} tokens"


def _methods() -> Iterator[Check]:
    from weft.methods import METHODS

    for method in (*METHODS, "lora+bitfit"):
        yield _try("methods", method, partial(train_one_step, method))


def train_one_step(method: str) -> str:
    """Take one optimizer step of a method on a model of two tiny blocks; says whether the loss went down."""
    from weft.adapters import Adapters
    from weft.data import Sample
    from weft.methods import METHODS
    from weft.models import describe
    from weft.objectives.passes import evaluate_loss
    from weft.training.job import Job
    from weft.training.settings import JobConfig
    from weft.training.step import train_step

    model = _tiny_model()
    adapters = Adapters(model, describe(model))
    try:
        settings: dict[str, object] = {"num_virtual_tokens": 4, "add_missing": True, "prompt_ids": [5, 9]}
        settings |= {"init_r": 4, "target_r": 2, "token_indices": [5]}
        fields = {key for name in method.split("+") for key in METHODS[name].model_fields}
        settings = {key: value for key, value in settings.items() if key in fields}
        config = JobConfig(name="check", method=method, steps=1, batch_size=2, warmup_ratio=0, method_settings=settings)
        samples = [Sample(ids, [0.0, *[1.0] * (len(ids) - 1)], "check") for ids in ([1, 5, 9, 7, 3], [2, 4, 6])]
        job = Job(config, adapters.add("check", config.method_config()), samples)
        before = evaluate_loss(adapters, "check", samples)
        if not job.active:
            return f"trains nothing: loss {before:.4f}"
        result = train_step(adapters, [job])["check"]
        after = evaluate_loss(adapters, "check", samples)
        if before is None or after is None or not after < before or result.grad_norm <= 0:
            raise ValueError(f"one step took the loss from {before:.4f} to {after:.4f}")
        return f"one step: loss {before:.4f} -> {after:.4f}"
    finally:
        adapters.close()


def _tiny_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def _show(checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    colours = {OK: "green", ABSENT: "dim", FAILED: "bold red"}
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for heading in ("", "what", "status", "detail"):
        table.add_column(heading, overflow="fold")
    section = ""
    for check in checks:
        if section and check.section != section:
            table.add_section()
        shown = check.section if check.section != section else ""
        section = check.section
        table.add_row(shown, check.name, Text(check.status, style=colours[check.status]), check.detail)
    common.console().print(table)
    failed = [check.name for check in checks if check.status == FAILED]
    print(f"\nfailed: {', '.join(failed)}" if failed else "\neverything that is here works.", file=sys.stdout)
