"""What another tool does with a model's folder: transformers alone, in a process that never imports Weft.

``Elsewhere`` starts this file as a script. It reads lines ``{"folder": ..., "conversations": [...], "tokens": n}`` and
writes, for each, the ids of every conversation and a greedy answer to it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def answered(folder: str, conversations: list[Any], tokens: int) -> list[dict[str, Any]]:
    """The ids that messages become, and the ids of the answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for messages in conversations:
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = inputs["input_ids"]
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)[0, ids.shape[1] :].tolist()
        ends = model.generation_config.eos_token_id
        if answer and answer[-1] in (ends if isinstance(ends, list) else [ends]):
            answer.pop()
        found.append({"ids": ids[0].tolist(), "answer": answer})
    return found


@contextmanager
def rendered_here(folder: Path, conversations: Sequence[Any]) -> Iterator[Callable[[], list[list[int]]]]:
    """``weft.export.rendering.fresh_ids`` in this process: the same function of transformers on the same messages."""
    from weft.data.rendering.served import message_fields
    from weft.export.fresh import ids_of

    yield lambda: ids_of(str(folder), [message_fields(messages) for messages in conversations])


class Elsewhere:
    """The process; one serves many folders, for it takes seconds to start."""

    def __init__(self) -> None:
        # Isolated: neither PYTHONPATH nor the working directory leads to Weft's sources.
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, folder: object, conversations: list[Any], tokens: int = 12) -> list[dict[str, Any]]:
        """What ``answered`` gives."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        question = {"folder": str(folder), "conversations": conversations, "tokens": tokens}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        assert told["weft"] is False
        found: list[dict[str, Any]] = told["found"]
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        found = answered(**json.loads(line))
        loaded = any(name.split(".")[0] == "weft" for name in sys.modules)
        print(json.dumps({"found": found, "weft": loaded}), flush=True)
