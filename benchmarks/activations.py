"""What do the choices of gradient checkpointing and of offload cost, and what do they save?

    python -m benchmarks.activations [--hidden 1024] [--layers 8] [--tokens 2048] [--steps 5] [--folder DIR]

LoRA on all linears of a random Llama and a random GPT-2 in bf16, the choices in turns over one batch. Bytes are those
of tensors that are held between forward and backward (files on a disk are none). Gradients must be equal to the bit.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from typing import Any

import torch
from tests.kit.alive import Alive
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weft.api import Adapters
from weft.data import Sample
from weft.methods import METHODS
from weft.models import describe
from weft.objectives.passes import Work, forward_losses

CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"checkpointing": True},
    {"checkpointing": 2},
    {"checkpointing": "cheap"},
    {"checkpointing": True, "offload": "disk"},
    {"checkpointing": "cheap", "offload": "disk"},
)


def models(hidden: int, layers: int) -> dict[str, Any]:
    heads, sizes = hidden // 64, {"vocab_size": 32000, "tie_word_embeddings": True}
    llama = LlamaConfig(hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
                        num_attention_heads=heads, **sizes)  # fmt: skip
    gpt2 = GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, **sizes)
    made = {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}
    return {name: model.to(torch.bfloat16).eval() for name, model in made.items()}


def one_pass(
    model: Any, samples: list[Sample], choice: dict[str, Any], *, count: bool
) -> tuple[float, int, list[Tensor]]:
    """Seconds, bytes between forward and backward (if counted), and the gradients."""
    adapters = Adapters(model, describe(model), **choice)
    config = METHODS["lora"](r=16, target_modules="all-linear")
    adapter = adapters.add("one", config, seed=0)
    held = 0
    begun = time.perf_counter()
    if count:
        with Alive() as alive:
            (loss,) = forward_losses(adapters, [Work("one", samples, 0)])
            held = alive.bytes()
            loss.backward()
    else:
        forward_losses(adapters, [Work("one", samples, 0)])[0].backward()
    seconds = time.perf_counter() - begun
    gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
    adapters.close()
    return seconds, held, gradients


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", help="of the files; default: that of temporary files")
    args = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print("| model | gradient_checkpointing | offload | held | time of forward and backward | ratio |")
    print("|---|---|---|---|---|---|")
    length = 256
    for name, model in models(args.hidden, args.layers).items():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 32000, (args.tokens // length, length), generator=generator).tolist()
        samples = [Sample(one, [1.0] * length, "") for one in ids]
        choices = [c | ({"offload_folder": args.folder} if "offload" in c and args.folder else {}) for c in CHOICES]
        counted = [one_pass(model, samples, choice, count=True) for choice in choices]
        for _, _, gradients in counted[1:]:
            assert all(torch.equal(a, b) for a, b in zip(gradients, counted[0][2], strict=True))
        times: list[list[float]] = [[] for _ in choices]
        for _ in range(args.steps):
            for place, choice in enumerate(choices):
                times[place].append(one_pass(model, samples, choice, count=False)[0])
        first = statistics.median(times[0])
        for choice, (_, held, _), found in zip(choices, counted, times, strict=True):
            which, where = choice.get("checkpointing", False), choice.get("offload", "")
            own = statistics.median(found)
            print(
                f"| {name} | {which} | {where} | {held / 1e6:,.0f} MB | {own:.2f} s | {own / first:.2f} |", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
