"""The demonstration run: five methods at once on an embedded base, measured before and after."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from weft.assets import instructions_path
from weft.evaluate.exact_match import Answer, exact_match
from weft.evaluate.measure import Measure
from weft.files.adapter_folder import weights_path
from weft.files.whole import write_whole
from weft.training import RunConfig, make_config
from weft.training.run import Setup, train

# Learning rates for a base of a million parameters, measured on tiny-llama (docs/demo.md). Large models want less.
JOBS: list[dict[str, Any]] = [
    {"method": "lora", "r": 8, "learning_rate": 4e-3},
    # The Llama-like base has no biases, as real Llamas have none, so the method adds some.
    {"method": "bitfit", "add_missing": True, "learning_rate": 4e-2},
    {"method": "prompt_tuning", "num_virtual_tokens": 20, "learning_rate": 0.1},
    {"method": "prefix_tuning", "num_virtual_tokens": 10, "learning_rate": 0.2},
    {"method": "bottleneck", "reduction_factor": 8, "learning_rate": 1e-2},
]
STEPS, BATCH_SIZE = 300, 16


@dataclass(frozen=True)
class MethodResult:
    """One row of the demo's table."""

    method: str
    trainable_parameters: int
    file_bytes: int
    _: KW_ONLY
    exact_match_before: float
    exact_match_after: float
    base_text_loss_change: float
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo. ``picture`` is the path of the drawn losses."""

    model: str
    output_dir: str
    picture: str
    _: KW_ONLY
    rows: list[MethodResult]
    by_task: dict[str, dict[str, float]]
    samples: list[dict[str, str]]
    seconds: dict[str, float]


def demo_config(model: str, output_dir: str, steps: int = STEPS) -> RunConfig:
    """The demo as a run configuration, as ``weft train`` takes it."""
    return make_config(
        {
            "model": model,
            "data": str(instructions_path("train")),
            "eval_data": str(instructions_path("eval")),
            "output_dir": output_dir,
            "overwrite_output_dir": True,
            "steps": steps,
            "batch_size": BATCH_SIZE,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
            "logging_steps": 10,
            # Two threads save a third of the time on an idle machine, and cost many times that on a busy one.
            "threads": 1,
            "jobs": JOBS,
        },
        source="demo",
    )


def run_demo(
    model: str,
    output_dir: str,
    *,
    steps: int = STEPS,
    on_event: Callable[[Mapping[str, Any]], None] = lambda event: None,
    on_ready: Callable[[Setup], None] = lambda setup: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> DemoResult | None:
    """Train the five methods at once and measure them; None if it was asked to stop.

    Raises:
        UserError: The model or the folder cannot be used.
    """
    begun = time.monotonic()
    config, measure = demo_config(model, output_dir, steps), Measure()
    events: list[Mapping[str, Any]] = []

    def note(event: Mapping[str, Any]) -> None:
        events.append(event)
        on_event(event)

    def ready(setup: Setup) -> None:
        on_ready(setup)
        measure.before(setup)

    result = train(config, on_event=note, should_stop=should_stop, on_ready=ready, on_trained=measure.after)
    if not result.completed:
        return None
    names = [job.name for job in config.jobs]
    return DemoResult(
        model,
        output_dir,
        str(draw_losses(events, Path(output_dir) / "loss.png", model)),
        rows=[_method_result(name, measure, output_dir, result.jobs[name]["seconds"]) for name in names],
        by_task={name or "base": _by_task(answers) for name, answers in measure.answers.items()},
        samples=_samples(measure),
        seconds={**measure.seconds, "training": result.seconds, "total": time.monotonic() - begun},
    )


def _method_result(name: str, measure: Measure, output_dir: str, seconds: float) -> MethodResult:
    weights = weights_path(Path(output_dir) / "adapters" / name)
    return MethodResult(
        name,
        measure.parameters[name],
        file_bytes=weights.stat().st_size if weights.is_file() else 0,
        exact_match_before=exact_match(measure.answers[None]),
        exact_match_after=exact_match(measure.answers[name]),
        base_text_loss_change=measure.text_losses[name] - measure.text_losses[None],
        seconds=seconds,
    )


def _by_task(answers: Sequence[Answer]) -> dict[str, float]:
    tasks = sorted({answer.question.task for answer in answers})
    return {task: exact_match([a for a in answers if a.question.task == task]) for task in tasks}


def _samples(measure: Measure) -> list[dict[str, str]]:
    """The first question of each task: the reference, and the answers of the base and of every method."""
    seen: set[str] = set()
    samples = []
    for index, question in enumerate(measure.questions):
        if question.task in seen:
            continue
        seen.add(question.task)
        said = {name or "base": answers[index].text for name, answers in measure.answers.items()}
        samples.append({"question": question.messages[-1].content, "reference": question.reference, **said})
    return samples


def draw_losses(events: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Draw every job's training loss over its steps, and its loss on held-out questions, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    jobs = list(dict.fromkeys(event["job"] for event in events if event["event"] == "step"))
    for number, job in enumerate(jobs):
        steps = [event for event in events if event["event"] == "step" and event["job"] == job]
        axes.plot([e["step"] for e in steps], [e["loss"] for e in steps], color=f"C{number}", label=job)
        held = [event for event in events if event["event"] == "eval" and event["job"] == job]
        if held:
            axes.plot([e["step"] for e in held], [e["eval_loss"] for e in held], "o", color=f"C{number}", markersize=5)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token")
    axes.set_title(f"{title}: one frozen base, one pass (lines: training; dots: held-out questions)")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    plt.close(figure)
    write_whole(path, drawn.getvalue())
    return path
