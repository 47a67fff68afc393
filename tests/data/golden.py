"""The golden renderings: where they lie, their tokenizers, and how a sample is written in them."""

from __future__ import annotations

import json
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.kit.tokenizers import byte_tokenizer, space_tokenizer
from transformers import AutoTokenizer

from weft.assets import model_path
from weft.data import SOFT, TEMPLATES, Conversation, Message, Renderer, Sample

PATH = Path(__file__).with_name("golden.json")
# What closes an answer, where it is not the embedded tokenizer's own end.
ENDS = {
    "chatml": "<|im_end|>", "deepseek": "<｜end▁of▁sentence｜>", "llama-3": "<|eot_id|>", "llama-3.1": "<|eot_id|>",
    "minimind": "<|im_end|>", "qwen2": "<|im_end|>", "qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>", "gemma-3": "<end_of_turn>", "phi-4": "<|im_end|>", "chatglm3": "<|user|>",
}  # fmt: skip


@cache
def tokenizer(name: str, template: str, shared: Path | None) -> Any:
    """``tiny``: the embedded one with the template's markers added; ``bytes`` and ``spaces``: of the kit; ``pad``: the
    same as ``tiny`` with the padding token that ends texts; others: a folder of the real data's tokenizers."""
    if name == "spaces":
        return space_tokenizer()
    if name == "bytes":
        return byte_tokenizer(adds_bos=True)
    if name not in ("tiny", "pad"):
        assert shared is not None
        real = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
        if real.eos_token is None:
            real.eos_token = "<|endoftext|>"
        return real
    fast = AutoTokenizer.from_pretrained(model_path("tiny-llama"))
    fast.add_special_tokens({"additional_special_tokens": list(TEMPLATES[template].markers) if template else []})
    fast.eos_token = ENDS.get(template, fast.eos_token)
    if name == "pad":
        fast.pad_token = fast.eos_token
    return fast


def template_text(vector: dict[str, Any]) -> str | None:
    """The Jinja text of a vector's template, with soft-prompt slots where it says so; None: the tokenizer's own."""
    text = TEMPLATES[vector["template"]].text if vector["template"] else None
    if vector.get("soft") and text is not None:  # one at the head, one before every answer
        text = f"{{{{- '{SOFT}' }}}}" + text.replace("'<|im_start|>assistant\\n'", f"'<|im_start|>assistant{SOFT}\\n'")
        return text.replace(
            "message.role + '\\n'", f"message.role + ('{SOFT}\\n' if message.role[0] == 'a' else '\\n')"
        )
    return text


def renderer(vector: dict[str, Any], shared: Path | None) -> Renderer:
    """For one golden rendering."""
    return Renderer(
        tokenizer(vector["tokenizer"], vector["template"], shared),
        chat_template=template_text(vector) if vector.get("soft") else vector["template"] or None,
        train_on=vector.get("train_on", "answers"),
        template_kwargs=vector.get("template_kwargs"),
    )


def conversation(vector: dict[str, Any]) -> Conversation:
    """Its input."""
    messages = (Message(**{**m, "tool_calls": tuple(m.get("tool_calls", ()))}) for m in vector["messages"])
    return Conversation(tuple(messages), vector["name"], tuple(vector.get("tools", ())))


def written(sample: Sample) -> dict[str, Any]:
    """A sample as a person can read and compare it: runs of one weight are ``count*weight``."""
    runs = [f"{len(list(group))}*{weight:g}" for weight, group in groupby(sample.weights)]
    slots = {"slots": list(sample.slots)} if sample.slots else {}
    return {"ids": " ".join(map(str, sample.input_ids)), "weights": " ".join(runs), "answer": sample.answer, **slots}


def load() -> list[dict[str, Any]]:
    """All of them."""
    return json.loads(PATH.read_text(encoding="utf-8"))
