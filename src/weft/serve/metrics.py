"""Figures of the server, in the text form that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Labels = tuple[str, ...]


class Counter:
    """A number that only grows, for each combination of its labels."""

    kind = "counter"

    def __init__(self, name: str, about: str, *labels: str) -> None:
        self.name, self.about, self.labels = name, about, labels
        self.values: dict[Labels, float] = {}

    def add(self, *labels: str, by: float = 1.0) -> None:
        """Count."""
        self.values[labels] = self.values.get(labels, 0.0) + by

    def forget(self, model: str) -> None:
        """Drop what is counted for a model that is gone."""
        for labels in [
            one for one in self.values if "model" in self.labels and model == one[self.labels.index("model")]
        ]:
            del self.values[labels]

    def lines(self) -> Iterator[str]:
        """The samples."""
        for labels, value in self.values.items():
            yield f"{self.name}{_named(self.labels, labels)} {_number(value)}"


class Histogram:
    """Times, sorted into buckets, for each model."""

    kind = "histogram"

    def __init__(self, name: str, about: str, bounds: tuple[float, ...]) -> None:
        self.name, self.about, self.bounds = name, about, bounds
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, seconds: float) -> None:
        """Count a time."""
        counts = self._counts.setdefault(model, [0] * (len(self.bounds) + 1))
        counts[bisect_left(self.bounds, seconds)] += 1
        self._sums[model] = self._sums.get(model, 0.0) + seconds

    def forget(self, model: str) -> None:
        """Drop what is counted for a model that is gone."""
        self._counts.pop(model, None)
        self._sums.pop(model, None)

    def lines(self) -> Iterator[str]:
        """The samples."""
        for model, counts in self._counts.items():
            total = 0
            for bound, count in zip((*map(_number, self.bounds), "+Inf"), counts, strict=True):
                total += count
                yield f"{self.name}_bucket{_named(('model', 'le'), (model, bound))} {total}"
            yield f"{self.name}_sum{_named(('model',), (model,))} {_number(self._sums[model])}"
            yield f"{self.name}_count{_named(('model',), (model,))} {total}"


class Metrics:
    """All figures, which only the event loop changes. Names of models are those that are served, so they are few."""

    def __init__(self) -> None:
        self.requests = Counter("weft_http_requests_total", "Requests by route and status.", "route", "status")
        self.rejected = Counter("weft_rejected_total", "Requests that were turned away.", "reason")
        self.answers = Counter("weft_answers_total", "Answers that have ended.", "model", "finish_reason")
        self.read = Counter("weft_prompt_tokens_total", "Tokens of prompts.", "model")
        self.cached = Counter(
            "weft_cached_prompt_tokens_total", "Tokens of prompts that were computed before.", "model"
        )
        self.written = Counter("weft_generated_tokens_total", "Tokens of answers.", "model")
        self.first = Histogram("weft_time_to_first_token_seconds", "From the request to its first token.", _FIRST_TOKEN)
        self.between = Histogram("weft_inter_token_seconds", "Between two tokens of an answer.", _BETWEEN)
        self.whole = Histogram("weft_answer_seconds", "From the request to the end of its answer.", _WHOLE)

    def forget(self, model: str) -> None:
        """Drop the figures of a model that is gone."""
        for one in self._all():
            one.forget(model)

    def _all(self) -> tuple[Counter | Histogram, ...]:
        return (self.requests, self.rejected, self.answers, self.read, self.cached, self.written, self.first,
                self.between, self.whole)  # fmt: skip

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All figures as text; ``gauges``: name -> (what it means, its value now)."""
        lines = []
        for name, (about, value) in gauges.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} gauge", f"{name} {_number(value)}"]
        for one in self._all():
            lines += [f"# HELP {one.name} {one.about}", f"# TYPE {one.name} {one.kind}", *one.lines()]
        return "\n".join(lines) + "\n"


def _named(names: Labels, values: Labels) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    found = ",".join(pairs)
    return f"{{{found}}}" if found else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
