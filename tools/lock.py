"""Writes requirements/*.txt from pyproject.toml: the versions known to be good, and the oldest that the ranges allow.

    make lock

Needs ``uv`` (its own settings say which index it asks). ``run.txt`` and ``dev.txt`` hold for every platform and Python,
with the hashes of all files of each version. torch is not in them: which build of it is right depends on the machine,
and each build names its CUDA libraries by exact version. ``torch.txt`` holds its version alone.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"
# What a CUDA build of torch brings; it pins them itself.
OF_TORCH = re.compile(r"(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==")
HEAD = "# Written by tools/lock.py (make lock). Do not edit.\n"


def compile_pins(*arguments: str) -> str:
    """What ``uv pip compile`` prints for pyproject.toml."""
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-emit-index-url",
               "--no-emit-find-links", "--python-version", "3.11", "pyproject.toml", *arguments]  # fmt: skip
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def entries(text: str) -> list[str]:
    """One string per requirement, with the lines of hashes that follow it."""
    found: list[str] = []
    for line in text.splitlines(keepends=True):
        if line[:1].isspace():
            found[-1] += line
        else:
            found.append(line)
    return found


def without_torch(text: str) -> str:
    return "".join(entry for entry in entries(text) if not OF_TORCH.match(entry))


def lower_bounds(project: dict) -> list[str]:
    """``name==version`` for every lower bound of a direct dependency."""
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"]]
    found = (re.fullmatch(r"([A-Za-z0-9_-]+)>=([0-9.]+).*", entry) for entry in wanted)
    return sorted({f"{match[1]}=={match[2]}" for match in found if match})


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        newest = compile_pins("--universal", "--extra", "dev", "--generate-hashes")
        (torch,) = set(re.findall(r"^torch==([0-9.]+)", newest, flags=re.MULTILINE))
        (FOLDER / "dev.txt").write_text(HEAD + without_torch(newest), encoding="utf-8")
        (FOLDER / "torch.txt").write_text(f"{HEAD}torch=={torch}\n", encoding="utf-8")
        pins = Path(folder) / "pins.txt"
        pins.write_text("\n".join(entry.split(" \\")[0].strip() for entry in entries(newest)), encoding="utf-8")
        run = compile_pins("--universal", "--generate-hashes", "--constraint", str(pins))
        (FOLDER / "run.txt").write_text(HEAD + without_torch(run), encoding="utf-8")
        pins.write_text("\n".join(lower_bounds(project)), encoding="utf-8")
        # Without hashes: these are no versions to work with, only to test with.
        oldest = compile_pins("--resolution", "lowest-direct", "--extra", "test", "--constraint", str(pins))
        oldest_torch = next(pin for pin in lower_bounds(project) if pin.startswith("torch=="))
        (FOLDER / "oldest.txt").write_text(f"{HEAD}{oldest_torch}\n{without_torch(oldest)}", encoding="utf-8")


if __name__ == "__main__":
    main()
