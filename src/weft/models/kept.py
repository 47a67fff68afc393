"""The findings of a base's proof on disk, so that the same base is not proved again every time it is loaded.

There is one small JSON file for each folder of weights, dtype, device and quantisation. It holds only while nothing has
changed that the proof depends on: Weft's own code, the libraries, the model's code and modules, its configuration, and
its files (their sizes, times and inodes: a file that was written again counts as another one). A base that was refused
is proved, and refused, each time.

The folder is ``~/.cache/weft/proofs``. The variable ``WEFT_CACHE_DIR`` names another in place of ``~/.cache/weft``; if
it is empty, nothing is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from weft.base.embeddings import config_of
from weft.core.architecture import Architecture
from weft.errors import UserError
from weft.foreign import read_json
from weft.measured import keep_text
from weft.models.finding import Finding, architecture_of, finding_of
from weft.paths import cache_folder

_LIMIT = 8 << 20  # bytes; a block of Llama's takes about 220


@dataclasses.dataclass(frozen=True)
class KeptProof:
    """The place of one base's finding, and the conditions under which it holds."""

    path: Path
    state: str

    @classmethod
    def of(cls, model: nn.Module, folder: Path) -> KeptProof | None:
        """The kept proof of a model that was loaded from a folder; None if nothing is kept."""
        root = cache_folder()
        weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".py"))
        if root is None or not any(path.suffix == ".safetensors" for path in weights):
            return None
        config = config_of(model)
        # One walk, because it takes most of the time of a kept proof.
        modules = list(model.named_modules())
        held = [(f"{path}.{n}", p) for path, m in modules for n, p in m._parameters.items() if p is not None]
        kinds = sorted({f"{p.dtype} {p.device}" for _, p in held})
        quantized = repr(getattr(config, "quantization_config", None))
        name = _hash([str(folder), *kinds, quantized])
        state = [
            _own_code(), torch.__version__, torch.backends.cpu.get_cpu_capability(),
            *_devices({p.device for _, p in held}),
            *_code_of(model), config.to_json_string(use_diff=False), str(getattr(config, "_attn_implementation", None)),
            str(getattr(config, "_experts_implementation", None)), *_stamps(weights),
            *(f"{path}:{type(module).__qualname__}" for path, module in modules),
            *(f"{path}:{p.dtype}{tuple(p.shape)}" for path, p in held),
        ]  # fmt: skip
        return cls(root / "proofs" / f"{name}.json", _hash(state))

    def recall(self, model: nn.Module) -> Architecture | None:
        """The model's proved architecture; None if there is none, or if the conditions have changed."""
        try:
            kept = read_json(self.path, limit=_LIMIT)
            if kept["state"] != self.state:
                return None
            return architecture_of(model, _finding_type().validate_python(kept["finding"]))
        except (UserError, KeyError, TypeError, AttributeError, ValidationError):
            return None  # there is no file, or another program wrote it, so the proof is made again

    def keep(self, proved: Architecture) -> None:
        """Write the finding. If the place cannot be written to, the next load makes the proof again, and no more."""
        text = json.dumps({"state": self.state, "finding": dataclasses.asdict(finding_of(proved))})
        keep_text(self.path, text)


@functools.cache
def _finding_type() -> TypeAdapter[Finding]:
    return TypeAdapter(Finding)


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _stamps(paths: Iterable[Path]) -> list[str]:
    """Name, size, times and inode of each file, some of which change when it is written."""
    found = []
    for path in paths:
        try:
            s = path.stat()
        except OSError:  # a broken link, which transformers did not need either
            found.append(f"{path.name}:")
            continue
        found.append(f"{path.name}:{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}:{s.st_ino}")
    return found


@functools.cache
def _own_code() -> str:
    package = Path(__file__).parent.parent
    return _hash(_stamps(sorted(package.rglob("*.py"))))


def _devices(devices: Iterable[torch.device]) -> list[str]:
    return sorted(torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in devices)


def _code_of(model: nn.Module) -> list[str]:
    """The libraries' versions and the file of the model's class."""
    import tokenizers
    import transformers

    source = Path(inspect.getfile(type(model)))
    return [transformers.__version__, tokenizers.__version__, str(source), *_stamps([source])]
