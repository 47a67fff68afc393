"""A judge: a model that compares answers in both orders, or scores them, with its biases measured."""

from weft.evaluate.judge.judging import Compared, Judge, Pair, Scored
from weft.evaluate.judge.prompts import JudgePrompts
from weft.evaluate.judge.reward import JudgeReward
from weft.evaluate.judge.rubric import Rubric

__all__ = ["Compared", "Judge", "JudgePrompts", "JudgeReward", "Pair", "Rubric", "Scored"]
