"""From AdapterHub's ``adapter_config.json``, of all versions, to settings of ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from weft.errors import UserError

# Entries beside the settings that say whose they are.
_ABOUT = frozenset(
    {"config", "config_id", "hidden_size", "model_class", "model_name", "model_type", "name", "type", "version",
     "label2id", "num_labels"}
)  # fmt: skip
# Entries that change nothing unless a setting that is refused is on.
_HARMLESS = re.compile(
    "(shared_|factorized_|learn_)?phm(?!_layer$).*|(shared|factorized)_(W_phm|phm_W)|hypercomplex_nonlinearity|"
    "init_weights_seed|stochastic_depth|inv_adapter_reduction_factor"
)
# The names of adapter-transformers, which wrote no version.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def adapterhub_settings(entries: Mapping[str, object], known: Collection[str]) -> dict[str, object]:
    """The settings in AdapterHub's ``adapter_config.json``, without entries that are off and not among ``known``.

    Raises:
        UserError: It is no bottleneck adapter, or an entry changes its results in a way that Weft does not know.
    """
    found = entries.get("config")
    if not isinstance(found, Mapping):
        raise UserError(f"adapter_config.json: 'config' is {found!r}, not the settings of an AdapterHub adapter.")
    found = {key: value for key, value in found.items() if not _HARMLESS.fullmatch(key)}
    if (kind := found.pop("architecture", None)) is not None:
        raise UserError(f"adapter_config.json: 'architecture' is {kind!r}; Weft loads AdapterHub's bottlenecks (null).")
    if "version" not in entries and found.get("non_linearity") in _OLD_ACTIVATIONS:
        found["non_linearity"] = _OLD_ACTIVATIONS[found["non_linearity"]]
    # AdapterHub ignores these there.
    if found.get("is_parallel"):
        found |= {"original_ln_before": False, "residual_before_ln": True, "adapter_residual_before_ln": False}
    found["adapter_residual_before_ln"] = bool(found.get("adapter_residual_before_ln") and found.get("ln_after"))
    unknown = {key: found.pop(key) for key in found.keys() - set(known)}
    unknown |= {key: value for key, value in entries.items() if key not in _ABOUT}
    for key in sorted(unknown):
        if unknown[key]:
            raise UserError(f"adapter_config.json: {key!r} is on, and Weft does not know what it changes; not loaded.")
    return found
