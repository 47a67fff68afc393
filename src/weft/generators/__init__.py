"""Generators: who writes text when Weft asks for some – a model behind an OpenAI-compatible address, or our engine.

A ledger keeps every answer, and a budget is never overrun.
"""

from weft.generators.budget import Budget, Price
from weft.generators.generator import Estimate, Generator, GeneratorError
from weft.generators.ledger import Ledger
from weft.generators.outcome import Failure, Generated, Usage
from weft.generators.request import GeneratorRequest
from weft.generators.scripted import ScriptedGenerator

__all__ = [
    "Budget",
    "Estimate",
    "Failure",
    "Generated",
    "Generator",
    "GeneratorError",
    "GeneratorRequest",
    "Ledger",
    "Price",
    "ScriptedGenerator",
    "Usage",
]
