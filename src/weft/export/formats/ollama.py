"""Ollama: a GGUF file, and the Modelfile that says how it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.data import Message
from weft.data.rendering.sandbox import render_chat
from weft.data.rendering.served import message_fields
from weft.data.rendering.tokens import Encoder
from weft.errors import UserError
from weft.export.format import Material, Written
from weft.export.formats.gguf import Gguf, write_model
from weft.export.gguf_model import end_ids
from weft.export.go_template import check_go_template, find_gaps, go_template
from weft.export.proof import fixed_texts
from weft.export.rendering import fixed_conversations
from weft.files.whole import write_text
from weft.foreign import read_json
from weft.models import gate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
# Ollama's names for what generation_config.json sets. Its own repeat_penalty is 1.1, which no other tool applies.
_PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
_ODD = ("  spaces at\nboth ends \n", 'quotes "here" and {{ braces }}', "a\\backslash\tand a tab")


class Ollama(Gguf):
    """The GGUF file, and a Modelfile with the chat template in Go's language."""

    name = "ollama"
    sentence = "the same, with a Modelfile for Ollama"

    def write(self, material: Material, part: Path, kind: str) -> Written:
        tokenizer = gate.load_tokenizer(material.folder)
        template, lines, notes = ollama_template(tokenizer)  # before the large file, for many are refused
        written, path = write_model(material, part, kind)
        write_text(part / MODELFILE, modelfile(path.name, template, material.folder, tokenizer))
        return Written(
            [*written.lines, *lines],
            [f"ollama create {path.stem.lower()} -f {MODELFILE}", f"ollama run {path.stem.lower()}"],
            figures=written.figures | {"modelfile": MODELFILE},
            notes=[*written.notes, *notes],
        )


def ollama_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str], list[str]]:
    """The chat template in Go's language, the figures of its proof, and what the user should know.

    Raises:
        UserError: There is none, or it cannot be said in that language.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise UserError("the model has no chat template, or several, and a Modelfile needs one. Export --to gguf.")

    def render(messages: Any) -> str:
        return render_chat(tokenizer, message_fields(messages), add_generation_prompt=True)

    encoder = Encoder(tokenizer)
    head = "".join(tokenizer.convert_ids_to_tokens(encoder.bos))
    gaps = find_gaps(render)
    template = go_template(gaps, head)
    asked = [*fixed_conversations(fixed_texts()), *([Message("user", text)] for text in _ODD)]
    count, spaces = check_go_template(template, render, asked, head)
    if '"""' in template:
        raise UserError("the chat template holds three quotes in a row, which a Modelfile cannot. Export --to gguf.")
    notes = []
    if not spaces:
        notes.append("spaces at the ends of a message are cut off by the chat template and not by Ollama, whose "
                     "language has no word for it.")  # fmt: skip
    if not gaps.system:
        notes.append("the chat template takes no system message; Ollama would write one without any mark.")
    return template, [f"the Modelfile's template gives the text of the chat template in {count} conversations"], notes


def modelfile(gguf: str, template: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a Modelfile."""
    lines = [f"FROM ./{gguf}", "", f'TEMPLATE """{template}"""', ""]
    for number in end_ids(folder, tokenizer):
        lines.append(f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(number)}"')
    path = folder / "generation_config.json"
    given = {"repetition_penalty": 1.0} | (read_json(path) if path.is_file() else {})
    for key, name in _PARAMETERS.items():
        if isinstance(given.get(key), (int, float)):
            lines.append(f"PARAMETER {name} {given[key]}")
    lines.append(f"PARAMETER num_ctx {gate.load_config(folder).max_position_embeddings}")
    return "\n".join(lines) + "\n"
