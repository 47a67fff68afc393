"""Token ids of messages by transformers alone. It runs as a script, in a process that never imports Weft.

``rendering`` starts it. It reads ``{"path": [...], "folder": ..., "conversations": [...]}`` as JSON from its input and
writes the ids of each conversation as JSON. The template has run on the same messages within Weft's limits before.
"""

from __future__ import annotations

import json
import sys


def ids_of(folder: str, conversations: list[list[dict[str, str]]]) -> list[object]:
    """The ids [prompt length] of each conversation, as the tokenizer in ``folder`` renders it to be answered."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in conversations
    ]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    json.dump(ids_of(asked["folder"], asked["conversations"]), sys.stdout)
