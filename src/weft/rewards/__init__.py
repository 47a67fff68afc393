"""Rewards: what an answer is worth. A reward is one file here, a function of an extension, or a trained adapter."""

from weft.rewards.registry import REWARDS, Rewarder, RewardSettings, register_reward

__all__ = ["REWARDS", "RewardSettings", "Rewarder", "register_reward"]
