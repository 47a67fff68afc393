"""The formats of export by their names. A new one is a file here and a line below."""

from __future__ import annotations

from weft.export.format import Format
from weft.export.formats.gguf import Gguf
from weft.export.formats.gguf_lora import GgufLora
from weft.export.formats.ollama import Ollama
from weft.export.formats.peft import Peft

FORMATS: dict[str, Format] = {one.name: one for one in (Peft(), Gguf(), GgufLora(), Ollama())}
