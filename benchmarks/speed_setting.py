"""What every contestant of ``train_speed.py`` shares: shape and random weights of the model, records, batches."""

from __future__ import annotations

import json
import os
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.data import Renderer, Sample, to_example
from weft.data.formats.turns import EmptyAnswerError
from weft.data.reading.records import read_records

MAX_LENGTH = 512
RANK, ALPHA = 16, 32
LEARNING_RATE = 2e-4
# transformers' group_by_length sorts within 50 batches at a time.
MEGABATCH = 50
_READ = 4000  # records taken from the head of the file; rendering all 42,000 would take longer than the benchmark


@dataclass(frozen=True)
class Shape:
    """A Llama shape; ``batch`` sequences per optimizer step."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    batch: int = 8
    vocabulary: int = 32_000


SHAPES = {"1.26b": Shape(2048, 5632, 22, 32), "160m": Shape(768, 2048, 12, 12), "tiny": Shape(64, 176, 2, 4)}


def build_model(shape: Shape, seed: int = 0) -> Any:
    """A Llama of this shape with random bfloat16 weights, the same for everyone; no float32 copy ever exists."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    rotary = type(model.model.rotary_emb)(config)  # its table is no parameter: made for real
    model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    model.config._attn_implementation = "sdpa"
    return model.eval()


def matmul_parameters(model: nn.Module) -> int:
    """N: parameters of the matrix products, head included, embedding table not."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def initial_adapter(name: str, like: Tensor) -> Tensor:
    """The value that lora_A ``name`` starts from, in every contestant: uniform within 1 / sqrt(in)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.rand(like.shape, generator=generator) * 2 - 1) / like.shape[1] ** 0.5


@dataclass(frozen=True)
class Plan:
    """Batches of one round. Both orders hold the same records; both begin with the same batch, which is not timed."""

    shuffled: list[list[Sample]]
    grouped: list[list[Sample]]


def shared_data() -> Path:
    """Where the real data lies."""
    return Path(os.environ.get("WEFT_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def make_plan(batch: int, steps: int, seed: int) -> Plan:
    """Draw records and cut them into a warm-up batch and ``steps`` timed ones, shuffled and length-grouped.

    A megabatch of 50 batches is drawn at random and sorted, as length grouping does; of its batches the ones at evenly
    spaced ranks are taken. So the grouped batches are as even as they are in a real run of it, however few are timed,
    and the records, which are then shuffled for the others, still have the lengths of the data.
    """
    samples = _read_samples()
    chosen = random.Random(seed).sample(samples, MEGABATCH * batch)
    chosen.sort(key=lambda s: len(s.input_ids))
    every = [chosen[i : i + batch] for i in range(0, len(chosen), batch)]
    warm = every[MEGABATCH // 2]
    ranks = [int((i + 0.5) * MEGABATCH / steps) for i in range(steps)]
    grouped = [every[r] if every[r] is not warm else every[r - 1] for r in ranks]
    grouped.reverse()  # longest first, as transformers does
    records = [sample for one in grouped for sample in one]
    random.Random(seed + 1).shuffle(records)
    shuffled = [records[i : i + batch] for i in range(0, len(records), batch)]
    return Plan([warm, *shuffled], [warm, *grouped])


def _read_samples() -> list[Sample]:
    """Real Alpaca records, rendered with the Llama-2 tokenizer; empty answers left out, cut to 512 tokens."""
    from transformers import AutoTokenizer

    data = shared_data()
    path = data / "sft" / "alpaca_en.json"
    if not path.is_file():
        raise SystemExit(f"skipped: the real Alpaca records are not at {path} (set WEFT_SHARED_DATA).")
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "llama2")
    renderer = Renderer(tokenizer, max_length=MAX_LENGTH, truncation="right")
    samples = []
    for record in read_records(path, limit=_READ):
        try:
            samples.append(renderer.sample(to_example(record)))
        except EmptyAnswerError:
            continue
    return samples


def peak_resident() -> int:
    """Most bytes this process ever held (VmHWM; unlike ru_maxrss it does not remember the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark measures memory on Linux only")


def hand_over(result: dict[str, Any]) -> None:
    """Give the parent process a result: the last line of standard output."""
    print("RESULT " + json.dumps(result), flush=True)
