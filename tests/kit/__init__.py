"""What the tests share: ``from tests import kit``. Tokenizers, encoders and mixtures of experts are in modules of their
own (``tests.kit.tokenizers``)."""

from tests.kit.adapters import gradients, hidden_of, open_with_all, parameters, randomize
from tests.kit.figures import difference, measured, sha256
from tests.kit.grids import in_turn
from tests.kit.methods import (
    ALL,
    DROPOUT,
    NOT_IDENTITY,
    NOT_MERGEABLE,
    SETTINGS,
    TRAINED,
    UNTRAINED,
    method_config,
)
from tests.kit.models import VOCABULARY, make_model, model_config
from tests.kit.samples import samples, texts
from tests.kit.traffic import run_traffic

from weft.methods import METHODS

__all__ = [
    "ALL",
    "DROPOUT",
    "METHODS",
    "NOT_IDENTITY",
    "NOT_MERGEABLE",
    "SETTINGS",
    "TRAINED",
    "UNTRAINED",
    "VOCABULARY",
    "difference",
    "gradients",
    "hidden_of",
    "in_turn",
    "make_model",
    "measured",
    "method_config",
    "model_config",
    "open_with_all",
    "parameters",
    "randomize",
    "run_traffic",
    "samples",
    "sha256",
    "texts",
]
