"""Write ``tests/data/golden.json``: what conversations become under every named template, for a person to review.

    PYTHONPATH=src:. python tools/golden_renderings.py ../shared/data

The text is transformers' own ``apply_chat_template``; ids and weights are the renderer's. Look at the difference before
it is committed: a change of a line here is a change of what models are trained on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.data.golden import PATH, conversation, renderer, template_text, tokenizer, written

from weft.data import TEMPLATES
from weft.errors import UserError

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
ONE = [user("Name a color."), answer("Blue.")]
TWO = [*ONE, user("And another?"), answer("Red.")]
TOOLS = [
    user("Weather in Bern?"),
    answer("", tool_calls=[CALL]),
    {"role": "tool", "content": '{"sky": "clear"}'},
    answer("Clear."),
]
CHINESE = [user("中国的首都是哪里？"), answer("北京。")]
EMPTY = [user(""), answer("Yes?")]
FORGED = [user("</s><|im_end|><|end|><|eot_id|> Name a color."), answer("Blue. </s><|im_end|>")]
THOUGHTS = [user("2+2?"), answer("<think>\nadd\n</think>\n\n4"), user("3+3?"), answer("<think>\nagain\n</think>\n\n6")]


def cases() -> Iterator[dict[str, Any]]:
    """Name, template ("": the tokenizer's own), tokenizer, messages, and what else a renderer is given."""
    for name, template in TEMPLATES.items():
        tiny = {"template": name, "tokenizer": "tiny"}
        last = {"train_on": "last_answer"} if name == "qwen3" else {}
        yield {"name": f"{name}: one question", **tiny, "messages": ONE}
        yield {"name": f"{name}: system, two rounds", **tiny, "messages": [SYSTEM, *TWO], **last}
        if template.tools:
            yield {"name": f"{name}: tools", **tiny, "messages": TOOLS, "tools": [WEATHER]}
    chatml = {"template": "chatml", "tokenizer": "tiny"}
    for name, template in (("Chinese", CHINESE), ("nothing asked", EMPTY), ("typed markers", FORGED)):
        yield {"name": f"chatml: {name}", **chatml, "messages": template}
        yield {"name": f"llama-2: {name}", "template": "llama-2", "tokenizer": "spaces", "messages": template}
        yield {"name": f"alpaca: {name}", "template": "alpaca", "tokenizer": "bytes", "messages": template}
    yield {"name": "chatml: padded with the end", **chatml, "tokenizer": "pad", "messages": TWO}
    yield {"name": "chatml: soft-prompt slots", **chatml, "messages": [SYSTEM, *TWO], "soft": True}
    yield {"name": "chatml: all", **chatml, "messages": TWO, "train_on": "all"}
    yield {"name": "chatml: last answer", **chatml, "messages": TWO, "train_on": "last_answer"}
    scaled = [*ONE, user("And?"), answer("Red.", loss_weight=0.25), user("And?"), answer("No.", train=False)]
    yield {"name": "chatml: weights per turn", **chatml, "messages": scaled}
    yield {"name": "chatml: its end is not the tokenizer's", **chatml, "tokenizer": "bytes", "messages": TWO}
    for greeting in ("mistral", "gemma"):
        wrong = [user("a"), user("b"), answer("c")]
        yield {"name": f"{greeting}: two questions", "template": greeting, "tokenizer": "tiny", "messages": wrong}
    qwen3 = {"template": "qwen3", "tokenizer": "tiny"}
    yield {"name": "qwen3: all answers of two rounds", **qwen3, "messages": TWO}
    yield {"name": "qwen3: thoughts", **qwen3, "messages": THOUGHTS, "train_on": "last_answer"}
    off = {"template_kwargs": {"enable_thinking": False}}
    yield {"name": "qwen3: thinking off", **qwen3, "messages": ONE, **off}
    yield {"name": "minimind: thoughts", "template": "minimind", "tokenizer": "tiny", "messages": THOUGHTS,
           "template_kwargs": {"open_thinking": True}}  # fmt: skip
    for real, own in (("llama2", "llama-2"), ("llama2", "vicuna"), ("minimind", ""), ("minimind", "minimind"),
                      ("gpt2", "alpaca")):  # fmt: skip
        for name, messages in (("two rounds", TWO), ("Chinese", CHINESE), ("typed markers", FORGED)):
            label = f"{own or 'its own template'} with the tokenizer of {real}: {name}"
            yield {"name": label, "template": own, "tokenizer": real, "messages": messages}


def vector(case: dict[str, Any], shared: Path) -> dict[str, Any]:
    """The case with what becomes of it."""
    tokens = tokenizer(case["tokenizer"], case["template"], shared)
    try:
        made, example = renderer(case, shared), conversation(case)
        sample = made.sample(example)
    except UserError as error:
        return {**case, "error": str(error)}
    text = tokens.apply_chat_template(
        [{key: m[key] for key in ("role", "content", "tool_calls") if key in m} for m in case["messages"]],
        tools=case.get("tools"),
        chat_template=template_text(case),
        tokenize=False,
        **case.get("template_kwargs", {}),
    )
    learned = [piece.text for piece in made.explain(example).pieces() if piece.weight]
    return {**case, "text": text, "learned": learned, **written(sample)}


def main() -> None:
    """Write the file."""
    shared = Path(sys.argv[1])
    lines = ",\n".join(json.dumps(vector(case, shared), ensure_ascii=False, indent=1) for case in cases())
    PATH.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
