"""The model and the answers of the golden numbers of preference objectives: no random number is in them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

WORDS = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "d", "e", "f", "g", "h"]
PROMPTS = ["a b", "c", "d d e"]
CHOSEN = [" d e f", " g", " a h"]
REJECTED = [" h", " a b c d", " a f e"]
MARGINS = [0.5, 0.0, 1.25]
VERDICTS = [True, False, False]  # of the chosen answers, for KTO

# Of each case TRL's settings, and ours.
DPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{kind: ({"loss_type": [kind]}, {"loss_type": kind}) for kind in (
        "sigmoid", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down", "sppo_hard", "nca_pair",
    )},
    **{kind: ({"loss_type": [kind], "label_smoothing": 0.1}, {"loss_type": kind, "label_smoothing": 0.1}) for kind in (
        "robust", "exo_pair",
    )},
    "sigmoid + sft": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, {"sft_weight": 0.3}),
}  # fmt: skip

# Of each case of GRPO TRL's settings, and ours; the answers, how much better each was, and how it was written.
GRPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {"loss_type": "grpo"}),
    "dapo": ({"loss_type": "dapo"}, {"loss_type": "dapo"}),
    "bnpo": ({"loss_type": "bnpo"}, {"loss_type": "bnpo"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "clip higher": ({"loss_type": "grpo", "epsilon_high": 0.28}, {"loss_type": "grpo", "epsilon_high": 0.28}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "grpo + ratio k3": (
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True}, {"loss_type": "grpo", "beta": 0.04}
    ),
}  # fmt: skip
GROUP_PROMPT = "a b"
GROUP = [" c d", " e", " f g h", " c c"]
ADVANTAGES = [1.0, -1.0, 0.5, -0.5]
LONGEST = 16


def offset(answer: int, token: int) -> float:
    """By how much the writer's log-probability of a token differs from the policy's."""
    return 0.3 * math.sin(3.0 * answer + token)


def ids(text: str) -> list[int]:
    """The token ids of a text of these words."""
    return [WORDS.index(word) for word in text.split()]


def model(number: int, *, scores: bool = False) -> Any:
    """Llama with two layers of width 16 in float64, whose weights are sines of their places."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1, **({"num_labels": 1} if scores else {}),
    )  # fmt: skip
    made = (LlamaForSequenceClassification if scores else LlamaForCausalLM)(config).double()
    fill(made, number)
    return made.eval()


def fill(made: nn.Module, number: int) -> None:
    """Set every parameter, by the order of the names."""
    with torch.no_grad():
        for place, (name, parameter) in enumerate(sorted(made.named_parameters())):
            at = torch.arange(parameter.numel(), dtype=torch.float64).view_as(parameter)
            wave = torch.sin(at * (1.1 + 0.013 * place) + place + 0.7 * number)
            parameter.copy_(1 + 0.1 * wave if "norm" in name else 0.3 * wave)


def digest(named: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of each gradient its norm and its product with a fixed wave: two numbers that stand for all."""
    found = {}
    for name, value in sorted(named.items()):
        wave = torch.cos(torch.arange(value.numel(), dtype=torch.float64) * 0.37 + len(name))
        found[name] = [float(value.double().norm()), float(value.double().flatten() @ wave) / math.sqrt(value.numel())]
    return found


def ppo_case(*, whole: bool) -> dict[str, Tensor]:
    """Four answers of 3, 1, 4 and 2 tokens, or of 4 each, in padded rows, as PPO's formulas take them.

    TRL's whitening of rewards gives pads a reward, which leaks into the advantages of real tokens; without pads it is
    right.
    """
    lengths, shape = torch.tensor([4, 4, 4, 4] if whole else [3, 1, 4, 2]), (4, 4)
    mask = torch.arange(4) < lengths[:, None]

    def wave(step: float, shift: float, scale: float = 1.0) -> Tensor:
        at = torch.arange(16, dtype=torch.float64).view(shape)
        return scale * torch.sin(at * step + shift) * mask

    old = (wave(1.7, 0.3) - 1.5) * mask
    return {
        "mask": mask.double(), "scores": torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64), "old": old,
        "reference": old + wave(0.9, 1.0, 0.3), "values": wave(2.3, 0.5), "logp": old + wave(1.3, 2.0, 0.4),
        "predicted": wave(2.3, 0.5) + wave(1.1, 0.2, 0.5),
    }  # fmt: skip
