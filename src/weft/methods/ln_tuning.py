"""Layer-norm tuning (Zhao et al. 2023, "Tuning LayerNorm in Attention"): only the norms' own weights are trained,
``y = norm(x; g', b')``. The adapter holds them whole, as PEFT's files do. They begin as the base's."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.architecture import Architecture
from weft.errors import UserError, nearest
from weft.methods.own_weights import OwnWeights, weight_parts
from weft.methods.site_adapter import SiteAdapter
from weft.patterns import last_parts, named, pattern

_STORED = "ln_tuning_layers"


class LNTuningConfig(MethodConfig):
    """The choice of the trained norms."""

    method: ClassVar[str] = "ln_tuning"
    peft_type: ClassVar[str] = "LN_TUNING"
    default_learning_rate: ClassVar[float] = 1e-3
    small_learning_rate: ClassVar[float | None] = 3e-2
    whole_values: ClassVar[bool] = True
    not_in_peft: ClassVar[frozenset[str]] = frozenset({"target_modules"})
    harmless_keys: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    target_modules: str | list[str] | None = Field(
        None, description="last parts of the norms' paths, or an expression over whole paths; default: every norm"
    )

    def build(self, name: str, context: BuildContext) -> Adapter:
        return LNTuning(self, name, context)

    def norms(self, architecture: Architecture) -> list[str]:
        """The paths of the tuned norms.

        Raises:
            UserError: An entry matches no norm.
        """
        norms, wanted = architecture.norms, self.target_modules
        last = sorted(last_parts(norms))
        if wanted is None:
            found = list(norms)
        elif isinstance(wanted, str):
            found = [path for path in norms if pattern(wanted, "target_modules").full(path)]
        else:
            stray = next((name for name in wanted if not any(named(path, [name]) for path in norms)), None)
            if stray is not None:
                hint = nearest(stray, last)
                raise UserError(f"ln_tuning: {stray!r} is no norm of this model.{hint} There are: {', '.join(last)}.")
            found = [path for path in norms if named(path, wanted)]
        if not found:
            raise UserError(f"ln_tuning finds no norm for target_modules {wanted!r}; there are: {', '.join(last)}.")
        return found

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        # PEFT knows the norms of few architectures, and applies an expression to every module.
        return {"target_modules": self.norms(architecture), "modules_to_save": None}

    @classmethod
    def from_peft(cls, entries: dict[str, object], keys: list[str]) -> MethodConfig:
        # The file's keys show the tuned modules; target_modules may be a default that we would have to guess.
        own = [key for key in keys if f".{_STORED}." in key]
        tuned = sorted({key.removeprefix(SiteAdapter.prefix).split(f".{_STORED}.")[0] for key in own})
        return super().from_peft({**entries, "target_modules": tuned}, keys)


class LNTuning(SiteAdapter):
    """Own weights for every targeted norm."""

    def __init__(self, config: LNTuningConfig, name: str, context: BuildContext) -> None:
        layers = {}
        for path in config.norms(context.architecture):
            module = context.model.get_submodule(path)
            layers[path] = OwnWeights(module, weight_parts(module, path), context)
        super().__init__(config, name, layers)

    def stored_name(self, part: str) -> str:
        return f"{_STORED}.{part}"
