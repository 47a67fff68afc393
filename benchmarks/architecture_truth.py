"""The judge's side: a model that only transformers has touched, and what it says.

Nothing of Weft is imported here. ``write_model`` makes the folder that both sides load.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.architecture_configs import make_config
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

# What a float32 pass may differ by, as a share of the largest logit; what the model itself loses to rounding is added.
LIMIT = 1e-5


def write_model(name: str, folder: Path, tokenizer: Any, seed: int = 0) -> None:
    """Save the tiny model called ``name``, with random weights none of which is neutral, and its tokenizer.

    Gains, biases, scales, gates, sinks and per-layer scalars begin at zero or one: a path that drops them would not be
    seen. So every floating-point parameter gets noise, embeddings more of it; of the buffers those that are biases.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(name), dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape) * (0.4 if "embed" in key and parameter.ndim > 1 else 0.1))
        for key, buffer in model.named_buffers():
            if buffer.is_floating_point() and "bias" in key.rsplit(".", 1)[-1]:
                buffer.add_(torch.randn(buffer.shape) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def relative(wanted: Tensor, found: Tensor) -> float:
    """The largest difference as a share of the largest number wanted; infinite where shapes differ or NaN is found."""
    if wanted.shape != found.shape:
        return float("inf")
    gap = float((wanted.double() - found.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))
    return gap if gap == gap else float("inf")


class Truth:
    """The untouched model of a folder."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = load_plain(folder)
        self.folder = folder
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [n, vocabulary] of one text alone, in float32."""
        key = tuple(ids)
        if key not in self._kept:
            self._kept[key] = plain_logits(self.model, ids)
        return self._kept[key]

    @torch.no_grad()
    def with_rows(self, rows: Tensor, ids: Sequence[int]) -> Tensor:
        """Logits of a text after some rows of embeddings [n, d] that stand for tokens before it."""
        table = self.model.get_input_embeddings()
        embeds = torch.cat([rows.to(torch.float32), table(torch.tensor(ids))])[None]
        return self.model(inputs_embeds=embeds, **_no_cache(self.model)).logits[0, len(rows) :].float()

    @torch.no_grad()
    def with_prefix(self, states: Sequence[tuple[Tensor, Tensor]], ids: Sequence[int]) -> Tensor:
        """Logits of a text whose every layer finds learned keys and values [kv_heads, n, head_dim] in its cache."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(states):
            cache.update(keys[None].clone(), values[None].clone(), layer)
        n = states[0][0].shape[1]
        names = inspect.signature(self.model.forward).parameters
        given = {"cache" if "cache" in names else "past_key_values": cache}
        mask = torch.ones(1, n + len(ids), dtype=torch.long)
        return self.model(input_ids=torch.tensor([list(ids)]), attention_mask=mask, use_cache=True, **given).logits[0]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest tokens, each from a whole pass: what generation means."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(plain_logits(self.model, ids)[-1].argmax()))
        return ids[len(prompt) :]

    def generated(self, prompt: Sequence[int], count: int) -> list[int] | str:
        """What transformers' own ``generate`` answers, greedily and without an end token; or why it fails."""
        config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0, bos_token_id=1)
        config.eos_token_id = None
        try:
            model = copy.deepcopy(self.model)
            model.generation_config = config
            ids = torch.tensor([list(prompt)])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            return [int(i) for i in out[0, len(prompt) :]]
        except Exception as error:
            return f"{type(error).__name__}: {first_line(error)}"

    def tied(self, ids: Sequence[int], token: int) -> bool:
        """Whether ``token`` is as likely after ``ids`` as the likeliest, but for rounding."""
        last = plain_logits(self.model, ids)[-1]
        return float(last.max() - last[token]) <= 1e-4 * float(last.abs().max())

    def loss(self, ids: Sequence[int]) -> float:
        """Summed cross-entropy of every token but the first, in float64."""
        logits = self.logits(ids).double()
        return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))


def load_plain(folder: Path) -> Any:
    """A folder's model as transformers gives it, in float32 and in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _no_cache(model: Any) -> dict[str, Any]:
    takes = inspect.signature(model.forward).parameters
    named = "use_cache" in takes or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    return {"use_cache": False} if named else {}


@torch.no_grad()
def plain_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Logits [n, vocabulary] that a model's own forward gives for one text alone."""
    try:
        return model(input_ids=torch.tensor([list(ids)]), **_no_cache(model)).logits[0]
    except TypeError:
        return model(input_ids=torch.tensor([list(ids)])).logits[0]


def rounding(model: Any, texts: Sequence[Sequence[int]]) -> float:
    """What float32 loses on these texts: against itself in float64; where that cannot run, what deep ones do."""
    try:
        wide = copy.deepcopy(model).double()
        if wide._can_set_experts_implementation():  # the default's kernel knows no float64
            wide.set_experts_implementation("eager")
        return max(relative(plain_logits(wide, ids).double(), plain_logits(model, ids)) for ids in texts)
    except Exception:  # a module that insists on float32
        return 5e-6


def guarded(run: Callable[[], Any]) -> Any:
    """What ``run`` gives, or the exception that it raises."""
    try:
        return run()
    except Exception as error:
        return error


def first_line(error: BaseException) -> str:
    """An exception's text on one line, cut."""
    return " ".join(str(error).split())[:300]
