"""The reference of all configuration keys, written from the code: ``python -m weft.cli.reference > docs/config.md``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from inspect import get_annotations
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from weft.core.adapter import MethodConfig
from weft.methods import METHODS
from weft.training.aliases import RENAMED, SWITCHES, VALUES
from weft.training.bits import TOLD
from weft.training.settings import JobConfig, RunConfig

_INTRO = """\
# Configuration

<!-- Written by `python -m weft.cli.reference`; a test compares. Do not edit. -->

A run is one YAML (or JSON) file. Keys of a job, and settings of its method, may stand at the top, where they are
defaults for every job that knows them:

```yaml
model: tiny-llama
data: train.jsonl
epochs: 2                  # for both jobs
jobs:
- {name: small, method: lora, r: 4}
- {method: prefix_tuning, num_virtual_tokens: 10, learning_rate: 5e-3}
```

One job may carry several methods. They are trained, saved and loaded as one adapter, and act in the order in which they
are named. Settings may stand beside the job's for all that know them, or under a method's name, where they win:

```yaml
method: prefix_tuning+bottleneck
reduction_factor: 8
prefix_tuning: {num_virtual_tokens: 10}
neftune_noise_alpha: 5     # noise on the embeddings goes with any method
```

On the command line `key=value` wins over the file, with YAML's values and dots for what lies deeper:
`learning_rate=1e-3`, `jobs.0.r=16`, `jobs.small.r=16` (by name), `eval_data=` (none). A job's key without dots wins in
every job that knows it, also over what the job itself says in the file; `jobs.small.r` is for that job alone. Of two
words the last wins; of keywords in Python, which have no order, the one that names a job or a method. `method` takes
the place of all `jobs`. An unknown key is an error that names the nearest one; so is a key that stands twice. Words are
those of YAML 1.2: `1e-3` is a number; `off`, `no`, `on`, `yes`, `12:30` are text, and a switch understands the four
words as well as `true` and `false`. In Python keys are keywords, `weft.train("run.yaml", learning_rate=1e-3)`
([python.md](python.md)); `weft.load_config("run.yaml")` and `weft.make_config(model=…)` give the configuration alone.
"""


def config_markdown() -> str:
    """The whole page."""
    parts = [
        _INTRO,
        "## The run\n",
        _table(RunConfig, {"jobs": "from `method`"}),
        "## A job\n",
        _table(JobConfig, {"name": "the method"}),
        "## The methods\n",
        *_methods(),
        "## Keys of other tools\n",
        "Accepted wherever the key itself may stand. Two keys with one meaning in one place are an error.\n",
        _aliases(),
    ]
    return "\n".join(parts)


def _table(cls: type[BaseModel], derived: Mapping[str, str] = MappingProxyType({})) -> str:
    """Every key; those of the class itself come before those of its bases."""
    own = dict.fromkeys(key for base in cls.__mro__ for key in get_annotations(base))
    fields = {key: cls.model_fields[key] for key in own if key in cls.model_fields}
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    lines += [
        f"| `{key}` | {_type(field)} | {derived.get(key) or _default(field)} | {field.description or ''} |"
        for key, field in fields.items()
        if key != "method_settings"
    ]
    return "\n".join(lines) + "\n"


def _type(field: Any) -> str:
    annotation = field.annotation
    text = getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"\b(typing|weft\.[\w.]+)\.", "", text)
    text = re.sub(r"Annotated\[(\w+), [^\]]*\]", r"\1", text)
    # Choices stand as they are written in YAML.
    text = re.sub(r"Literal\[([^\]]*)\]", lambda found: " | ".join(re.findall(r"'([^']*)'", found[1])), text)
    text = re.sub(r"(?:Union|Optional)\[(.*)\]", lambda found: found[1].replace(", ", " | "), text)
    text = re.sub(r"tuple\[JobConfig, \.\.\.\]", "list of jobs", text)
    return text.replace(" | None", "").replace("|", "\\|")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    return "" if field.default is None else f"`{_yaml(field.default)}`"


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _methods() -> Iterator[str]:
    for name, cls in METHODS.items():
        summary = " ".join((cls.__doc__ or "").split()).replace("``", "`")
        yield f"### {name}\n\n{summary} Learning rate by default: {_rates(cls)}.\n"
        yield _table(cls)


def _rates(cls: type[MethodConfig]) -> str:
    small, large = cls.learning_rate(128), cls.learning_rate(2048)
    return f"{large:g}" if small == large else f"{large:g} (bases of width 2048 and more) to {small:g} (128 and less)"


def _aliases() -> str:
    lines = ["| theirs | here |", "|---|---|"]
    lines += [f"| `{key}` | `{ours}` |" for key, ours in RENAMED.items()]
    lines += ["| `adam_beta1`, `adam_beta2` | one of `adam_betas` |"]
    lines += [f"| `{key}` | {told} |" for key, told in {**{k: s.told for k, s in SWITCHES.items()}, **TOLD}.items()]
    for key, words in VALUES.items():
        pairs = ", ".join(f"`{theirs}` → `{ours}`" for theirs, ours in words.items())
        lines.append(f"| values of `{key}` | {pairs} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(config_markdown(), end="")
