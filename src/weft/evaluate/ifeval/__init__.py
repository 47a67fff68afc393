"""IFEval's instructions, whose following a program can tell (Zhou et al. 2023, arXiv 2311.07911)."""

from weft.evaluate.ifeval.checks import CHECKS, follows, follows_loosely, unknown_instruction

__all__ = ["CHECKS", "follows", "follows_loosely", "unknown_instruction"]
