"""Whether a run that goes on is the run that began: the same base, settings and data, wherever they lie now."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from weft.assets import EMBEDDED_MODELS
from weft.data.settings import free_keys
from weft.data.sources import with_paths
from weft.errors import UserError
from weft.models.hub import folder_of, is_dataset_id
from weft.models.load import Base, resolve_model
from weft.models.originals import stored_tensors
from weft.paths import from_root
from weft.training.settings import OWN_TEXT, JobConfig, RunConfig

_DATA = ("data", "eval_data")
_PATHS = (*_DATA, "forgetting_eval")


def base_fingerprint(base: Base) -> dict[str, object]:
    """Enough of the base to notice that it is another one: its name, its size, a hash of its smallest tensors."""
    tensors = base.model.state_dict()
    digest = _digest({key: tensors[key] for key in _smallest(tensors)})
    distinct = {(t.data_ptr(), t.shape): t.numel() for t in tensors.values()}  # a tied head is the embeddings' tensor
    parameters = sum(distinct.values())
    return {"model": resolve_model(base.name), "parameters": parameters, "sha256_of_small_tensors": digest}


def _smallest(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the smallest tensors [...], the smallest first."""
    return sorted(tensors, key=lambda key: (tensors[key].numel(), key))[:64]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The hash of tensors [...] with their names, in their order."""
    digest = hashlib.sha256()
    for key, tensor in tensors.items():
        digest.update(key.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def other_base(base: Base, recorded: Mapping[str, object]) -> str | None:
    """How the base differs from the one of this fingerprint, with both names; None: it does not, as far as it tells."""
    found, known = base_fingerprint(base), recorded.get("parameters")
    if known == sum(t.numel() for t in base.model.state_dict().values()):  # in earlier versions a tied head counted too
        found["parameters"] = known
    keys = [key for key in ("parameters", "sha256_of_small_tensors") if found[key] != recorded.get(key, found[key])]
    if not keys:
        return None
    told = ", ".join(f"{key} {_brief(found[key])} instead of {_brief(recorded[key])}" for key in keys)
    return f"here {found['model']}, in training {recorded.get('model', '(a name that is not kept)')}: {told}"


def other_base_in_files(sketch: Base, recorded: Mapping[str, object]) -> str | None:
    """``other_base`` before weights are loaded, of a base that is not quantised; None: none, as far as its files tell.

    What they leave open, such as a name that the loaded model has alone, the loaded base tells.
    """
    named = sketch.model.state_dict(keep_vars=True)
    count = sum({id(tensor): tensor.numel() for tensor in named.values()}.values())
    known = recorded.get("parameters", count)
    if known not in (count, sum(tensor.numel() for tensor in named.values())):  # as ``other_base``
        return (
            f"here {resolve_model(sketch.name)}, in training {recorded.get('model', '(a name that is not kept)')}: "
            f"parameters {count:,} instead of {_brief(known)}"
        )
    if "sha256_of_small_tensors" not in recorded:
        return None
    folder = folder_of(resolve_model(sketch.name))
    # A tied tensor is stored under one of its names.
    tied = {key: [other for other in named if named[other] is named[key]] for key in _smallest(named)}
    stored = None if folder is None else stored_tensors(folder, tied)
    # Rows may have been added, and of several dtypes only the loader tells which one counts.
    if stored is None or any(tensor.shape != named[key].shape for key, tensor in stored.items()):
        return None
    if len({tensor.dtype for tensor in stored.values()}) != 1:
        return None
    found = _digest({key: tensor.to(named[key].dtype) for key, tensor in stored.items()})
    if found == recorded["sha256_of_small_tensors"]:
        return None
    return (
        f"here {resolve_model(sketch.name)}, in training {recorded.get('model', '(a name that is not kept)')}: "
        f"sha256_of_small_tensors {_brief(found)} instead of {_brief(recorded['sha256_of_small_tensors'])}"
    )


def _brief(value: object) -> str:
    """A number, or the beginning of a hash, which is enough to tell it from another."""
    return f"{value:,}" if isinstance(value, int) else f"{str(value)[:12]}…"


def check_base(base: Base, recorded: Mapping[str, object]) -> None:
    """Refuse to go on over another base than the one that a run began with.

    Raises:
        UserError: It is another one; the message names both, with their hashes.
    """
    if other := other_base(base, recorded):
        raise UserError(f"cannot resume over another base ({other}). Give back the first one.")


def rooted(config: RunConfig) -> RunConfig:
    """The configuration with every path from the root: ``run.json`` keeps it, so that the run goes on anywhere."""

    def data(own: object) -> object:
        if own is None or own == OWN_TEXT:
            return own
        return with_paths(own, lambda path: path if is_dataset_id(path) else from_root(path))

    def job_of(job: JobConfig) -> JobConfig:
        settings = _with_adapters(job.objective_settings, from_root)
        start = None if job.start_from is None else from_root(job.start_from)
        own = {key: data(getattr(job, key)) for key in _DATA}
        return job.model_copy(update={**own, "objective_settings": settings, "start_from": start})

    jobs = tuple(map(job_of, config.jobs))
    changes: dict[str, object] = {"jobs": jobs, **{key: data(getattr(config, key)) for key in _PATHS}}
    if config.model not in EMBEDDED_MODELS and Path(config.model).is_dir():
        changes["model"] = from_root(config.model)
    if config.bad_records_file is not None:
        changes["bad_records_file"] = str(Path(config.bad_records_file).absolute())
    return config.model_copy(update={**changes, "output_dir": str(Path(config.output_dir).absolute())})


def check_same_run(config: RunConfig, begun: RunConfig) -> None:
    """Refuse settings that would make it another run.

    Where the data and the base lie may change: a checkpoint knows the data by its content, ``run.json`` the base by its
    tensors.

    Raises:
        UserError: Some differ; the message names each, with its old and its new value.
    """
    old, new = _settings(begun), _settings(config)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        lines = "\n".join(f"  {key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in changed)
        raise UserError(
            f"cannot resume: the configuration has changed since the run began:\n{lines}\nPut it back, or begin a new "
            "run in another output_dir."
        )


def _settings(config: RunConfig) -> dict[str, object]:
    """The settings that must stay, by their place: ``jobs.lora.batch_size``."""
    values = config.model_dump(mode="json", exclude={*free_keys(RunConfig), "model", "jobs"})
    found = _flat(_placeless(values), "")
    for job in config.jobs:
        found |= _flat(_placeless(job.model_dump(mode="json", exclude=set(free_keys(JobConfig)))), f"jobs.{job.name}.")
    return found


def _placeless(values: Mapping[str, object]) -> dict[str, object]:
    """The values, with nothing in the place of the paths of data."""
    found = {
        key: with_paths(value, lambda path: "…") if key in _PATHS and value not in (None, OWN_TEXT) else value
        for key, value in values.items()
    }
    if found.get("start_from") is not None:  # a checkpoint has the values
        found["start_from"] = "…"
    settings = found.get("objective_settings")
    if isinstance(settings, Mapping):
        found["objective_settings"] = _with_adapters(settings, lambda path: "…")
    return found


def _with_adapters(settings: Mapping[str, object], change: Callable[[str], str]) -> dict[str, object]:
    """An objective's settings with other paths of the adapters that give rewards."""
    rewards = settings.get("rewards")
    if not isinstance(rewards, (list, tuple)):
        return dict(settings)
    named = [
        {**one, "adapter": change(str(one["adapter"]))} if isinstance(one, Mapping) and one.get("adapter") else one
        for one in rewards
    ]
    return {**settings, "rewards": named}


def _flat(values: Mapping[str, object], above: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            name = above if key == "method_settings" else f"{above}{key}."
            found |= _flat(value, name)
        else:
            found[f"{above}{key}"] = value
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
