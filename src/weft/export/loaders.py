"""What loads an adapter's folder: peft, vLLM, llama.cpp, Ollama; and if not, why not.

The answer is read from the folder's own files, so it holds for a folder of any origin. What each program takes is known
from its own checks; where one would take a file and compute something else, the answer is no.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from weft.export.gguf_architectures import ARCHITECTURES
from weft.files.adapter_folder import CONFIG, read_own, weights_path
from weft.foreign import check_safetensors, read_json

# The kinds of adapters that are PEFT's as well as ours; of the others Weft's files have a type of their own.
PEFT_TYPES = frozenset(
    {"LORA", "ADALORA", "IA3", "LN_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "TRAINABLE_TOKENS", "VERA"}
)
# vLLM reserves room for each rank up to its --max-lora-rank, whose default is the first of these.
_USUAL_RANK, _LARGEST_RANK = 16, 512


@dataclass(frozen=True)
class Loader:
    """A program, and whether it loads the adapter.

    Attributes:
        how: the words that load it.
        why: why it does not; empty if it does.
    """

    name: str
    how: str
    why: str = ""

    @property
    def loads(self) -> bool:
        """Whether it loads the adapter."""
        return not self.why

    def line(self) -> str:
        """The answer as a line for people."""
        return f"{self.name}: yes ({self.how})" if self.loads else f"{self.name}: no, {self.why}"


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's files say of it.

    Attributes:
        entries: ``adapter_config.json``; empty for several methods in one adapter.
        shapes: the shapes of its tensors by their names.
        parts: the folders of its parts, where it has several methods.
        model_type: of its base, if that is known.
        tied: whether its base's output layer is the table of embeddings.
    """

    entries: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]
    _: KW_ONLY
    parts: tuple[str, ...] = ()
    model_type: str | None = None
    tied: bool = False

    @property
    def kind(self) -> str:
        """Its type in words."""
        return "several methods in one adapter" if self.parts else str(self.entries.get("peft_type") or "of no type")


def adapter_files(folder: Path, *, model_type: str | None = None, tied: bool = False) -> AdapterFiles:
    """What the files of an adapter's folder say.

    Raises:
        UserError: One cannot be read.
    """
    parts = read_own(folder).get("parts")
    entries = {} if parts or not (folder / CONFIG).is_file() else read_json(folder / CONFIG)
    weights = weights_path(folder)
    header: dict[str, Any] = check_safetensors(weights) if weights.is_file() else {}
    shapes = {key: tuple(one["shape"]) for key, one in header.items()}
    named = tuple(map(str, parts)) if isinstance(parts, list) else ()
    return AdapterFiles(entries, shapes, parts=named, model_type=model_type, tied=tied)


def loaders(files: AdapterFiles) -> list[Loader]:
    """The programs, and whether each loads the adapter."""
    rank = max((shape[0] for key, shape in files.shapes.items() if key.endswith(".lora_A.weight")), default=0)
    more = f" --max-lora-rank {_rank_of_vllm(rank)}" if rank > _USUAL_RANK else ""
    of_file = gguf_obstacle(files)
    return [
        Loader("peft", "PeftModel.from_pretrained(base, folder)", _peft_obstacle(files)),
        Loader("vLLM", f"vllm serve BASE --enable-lora{more} --lora-modules NAME=FOLDER", _vllm_obstacle(files, rank)),
        Loader("llama.cpp", "as weft export --to gguf-lora writes it: llama-server -m BASE.gguf --lora FILE", of_file),
        Loader("Ollama", "as weft export --to gguf-lora writes it: ADAPTER FILE in a Modelfile FROM its base's GGUF",
               of_file),
    ]  # fmt: skip


def _rank_of_vllm(rank: int) -> int:
    return next((one for one in (8, 16, 32, 64, 128, 256, 320, 512) if one >= rank), rank)


def _peft_obstacle(files: AdapterFiles) -> str:
    """Why peft does not load it; empty if it does."""
    if files.parts:
        return f"it loads one method; each of {', '.join(files.parts)} loads alone, and together they are Weft's"
    if files.entries.get("peft_type") not in PEFT_TYPES:
        return f"it has no method of the type {files.kind}"
    return ""


def _vllm_obstacle(files: AdapterFiles, rank: int) -> str:
    """Why vLLM does not load it; empty if it does."""
    if why := lora_obstacle(files):
        return why
    if outside := [key for key in files.shapes if ".layers." not in key and ".h." not in key]:
        return f"it changes blocks alone, and this one has {_module_of(outside[0])}"
    if files.entries.get("rank_pattern") or files.entries.get("alpha_pattern"):
        return "it scales every module by lora_alpha and r, and this one has rank_pattern or alpha_pattern"
    return f"it takes ranks up to {_LARGEST_RANK}, and this one's is {rank}" if rank > _LARGEST_RANK else ""


def lora_obstacle(files: AdapterFiles) -> str:
    """Why a program that knows plain LoRA alone does not load it; empty if it does."""
    entries = files.entries
    if files.parts or entries.get("peft_type") != "LORA":
        return f"it knows LoRA alone, and this is {files.kind}"
    if entries.get("use_dora"):
        return "it knows no DoRA (use_dora)"
    for key, words in (
        ("modules_to_save", "modules that are trained whole"),
        ("target_parameters", "parameters of experts"),
        ("trainable_token_indices", "trained rows of tokens"),
    ):
        if value := entries.get(key):
            named = ", ".join(map(str, value)) if isinstance(value, list) and key != "trainable_token_indices" else ""
            return f"it takes no {words} ({key}{': ' * bool(named)}{named})"
    if entries.get("bias") not in (None, "none"):
        return f"it takes no trained biases (bias: {entries['bias']})"
    strange = [key for key in files.shapes if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange:
        return f"it takes no {_module_of(strange[0])}"
    return ""


def gguf_obstacle(files: AdapterFiles) -> str:
    """Why the adapter cannot be written as a LoRA in GGUF; empty if it can."""
    if why := lora_obstacle(files):
        return why
    if files.model_type is not None and files.model_type not in ARCHITECTURES:
        return f"{files.model_type} models are not among those that Weft can prove ({', '.join(ARCHITECTURES)})"
    if files.tied and any("lm_head." in key for key in files.shapes):
        return "its file of a base with tied embeddings has no output layer, and this one changes it (lm_head)"
    return ""


def _module_of(key: str) -> str:
    return key.removeprefix("base_model.model.")
