"""A LoRA adapter in llama.cpp's own format: the factors by its names for the modules, in its order of rows.

llama.cpp scales a module's change by ``adapter.lora.alpha`` over the module's rank. Where an adapter scales otherwise
(rsLoRA, patterns), B takes the difference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.base.embeddings import config_of
from weft.errors import UserError
from weft.export.format import Format, Material, Written
from weft.export.gguf_architectures import architecture_of
from weft.export.gguf_file import GgufContent, check_library, write_gguf
from weft.export.gguf_model import NameMap, file_name
from weft.export.loaders import AdapterFiles, adapter_files, gguf_obstacle
from weft.files import adapter_folder as files
from weft.files.whole import make_folder
from weft.methods.lora import LoraConfig
from weft.models.load import sketch_base

if TYPE_CHECKING:
    from weft.models import Base

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])\.weight")


def gguf_lora(folder: Path, base: Base, found: AdapterFiles, kind: str) -> GgufContent:
    """The content of the GGUF file of the adapter in a folder.

    Args:
        base: its base, of which only the shapes are asked.
        found: what its files say.
        kind: f32, f16 or bf16.

    Raises:
        UserError: The adapter is more than LoRA, or llama.cpp has no place for one of its modules.
    """
    if why := gguf_obstacle(found):
        raise UserError(_refusal(folder, why))
    hf_config = config_of(base.model)
    architecture = architecture_of(hf_config)
    config, tensors, _ = files.read(folder, base.model)
    assert isinstance(config, LoraConfig)
    # This checks the shapes against the base's.
    files.assemble("one", config, tensors, base.model, base.architecture)
    names = NameMap(architecture, hf_config.num_hidden_layers)
    content = GgufContent(architecture.name)
    content.settings |= {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(config.lora_alpha),
    }
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        assert match is not None
        path, tensor = match["path"], tensor.float()
        if match["side"] == "B":
            usual = config.lora_alpha / config.rank(path)
            tensor = tensor * (config.scaling(path) / usual)
            tensor = architecture.rows_laid_out(path.rpartition(".")[2], tensor, hf_config)
        content.keep(f"{names(f'{path}.weight')}.lora_{match['side'].lower()}", tensor, kind)
    return content


class GgufLora(Format):
    """The factors alone, for a GGUF file of the base."""

    name = "gguf-lora"
    sentence = "the LoRA alone, for llama.cpp beside its base's GGUF file"
    kinds = {"f32": "32 bits", "f16": "16 bits", "bf16": "16 bits, of which more for the exponent"}

    def check(self, material: Material, entries: Mapping[str, Any]) -> None:
        check_library()
        if material.adapter is None:
            raise UserError(f"{material.folder} is a model, not an adapter; --to gguf-lora is for adapters.")
        if why := gguf_obstacle(_files(material, entries)):
            raise UserError(_refusal(material.adapter, why))

    def write(self, material: Material, part: Path, kind: str) -> Written:
        assert material.adapter is not None
        assert material.base is not None
        base = sketch_base(material.base, tokens=files.added_tokens(material.adapter))
        content = gguf_lora(material.adapter, base, _files(material, config_of(base.model).to_dict()), kind)
        content.settings |= {"general.name": material.name}
        make_folder(part)
        path = part / file_name(f"{material.name}-lora", kind)
        write_gguf(content, path)
        beside = f"# BASE: weft export {Path(material.base).name} --to gguf"
        return Written(
            [content.read_back_line(kind)],
            [f"llama-server -m BASE.gguf --lora {path.name}   {beside}"],
            figures={"file": path.name, "tensors": len(content.tensors), "kind": kind},
        )


def _files(material: Material, entries: Mapping[str, Any]) -> AdapterFiles:
    assert material.adapter is not None
    tied = bool(entries.get("tie_word_embeddings"))
    return adapter_files(material.adapter, model_type=entries.get("model_type"), tied=tied)


def _refusal(folder: Path, why: str) -> str:
    return f"{folder} cannot be written as a LoRA for llama.cpp: {why}. Export the merged model: --to gguf."
