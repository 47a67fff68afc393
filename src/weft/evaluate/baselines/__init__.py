"""Prompting baselines: the base itself, asked with examples or with an instruction, as contestants beside adapters."""

from weft.evaluate.baselines.entrants import pools_of, prompting_entrants
from weft.evaluate.baselines.wanted import Wanted, wanted_of

__all__ = ["Wanted", "pools_of", "prompting_entrants", "wanted_of"]
