"""GGUF of a whole model, for llama.cpp and what is built on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import UserError
from weft.export import llama_cpp
from weft.export.format import Format, Material, Written
from weft.export.gguf_architectures import check_type
from weft.export.gguf_file import check_library, write_gguf
from weft.export.gguf_model import check_exportable, file_name, gguf_model
from weft.export.samples import fixed_samples
from weft.files.whole import make_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Gguf(Format):
    """One file with tensors, settings, tokenizer and chat template."""

    name = "gguf"
    sentence = "the model, with the adapter in its weights, as one file for llama.cpp"
    kinds = {
        "f16": "16 bits",
        "q8_0": "8 bits in blocks of 32",
        "f32": "32 bits",
        "bf16": "16 bits, of which more for the exponent",
    }
    of_model = True

    def check(self, material: Material, entries: Mapping[str, Any]) -> None:
        check_library()
        if "model_type" in entries:
            check_type(str(entries["model_type"]))

    def check_model(self, config: PreTrainedConfig) -> None:
        check_exportable(config)

    def write(self, material: Material, part: Path, kind: str) -> Written:
        return write_model(material, part, kind)[0]


def write_model(material: Material, part: Path, kind: str) -> tuple[Written, Path]:
    """Write the file of a model's folder, and prove it: what was written, and its path.

    Raises:
        UserError: GGUF has no place for something, or llama.cpp makes another model of it.
    """
    content = gguf_model(material.folder, kind)
    content.settings |= {"general.name": material.name}
    make_folder(part)
    path = part / file_name(material.name, kind)
    write_gguf(content, path)
    lines = [content.read_back_line(kind)]
    figures: dict[str, object] = {"file": path.name, "tensors": len(content.tensors), "kind": kind}
    if llama_cpp.installed():
        try:
            proof = llama_cpp.prove(path, fixed_samples(material.folder))
        except UserError as error:
            raise UserError(f"{error} --dtype f32 rounds least.") from None
        lines.append(proof.line())
        figures["llama_cpp"] = {"positions": proof.positions, "agreement": proof.agreement,
                                "difference": proof.difference, "version": proof.version}  # fmt: skip
    else:
        lines.append("not run in llama.cpp, for llama-cpp-python is not installed here")
    python = f'Llama("{path.name}").create_chat_completion(messages)  # llama-cpp-python'
    return Written(lines, [f"llama-server -m {path.name}", python], figures=figures, notes=content.notes), path
