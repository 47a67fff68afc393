"""What a plain model's folder gives for fixed prompts, by transformers alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from weft.data import Message
from weft.data.rendering.served import ids_elsewhere
from weft.export.proof import fixed_texts
from weft.models import gate

# A few positions show whether a file is the model or another; each costs a pass of the whole model.
_PROMPTS, _LONGEST = 6, 64


def fixed_ids(folder: Path) -> list[list[int]]:
    """Fixed prompts as the folder's tokenizer and chat template make ids of them."""
    tokenizer = gate.load_tokenizer(folder)
    found = []
    for text in fixed_texts()[4 : 4 + _PROMPTS]:
        if tokenizer.chat_template:
            ids = ids_elsewhere(tokenizer, None, [Message("user", text)])
        else:
            ids = list(tokenizer(text, verbose=False)["input_ids"])
        found.append(ids[:_LONGEST])
    return found


@torch.no_grad()
def plain_logits(folder: Path) -> list[tuple[list[int], Tensor]]:
    """Fixed prompts, each with its logits [positions, tokens] in 32 bits."""
    from transformers import AutoModelForCausalLM

    config = gate.load_config(folder)
    model = nn.Module.to(gate.load_weights(AutoModelForCausalLM, folder, config, dtype=torch.float32), "cpu").eval()
    limit = int(config.max_position_embeddings)
    return [(ids, model(input_ids=torch.tensor([ids])).logits[0]) for ids in (one[:limit] for one in fixed_ids(folder))]
