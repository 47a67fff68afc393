"""What a run's process holds beside tensors: the interpreter, torch, transformers, the data.

What is loaded by the time a plan is made, the plan finds in its own process. What loading a base and the first step add
(more modules, threads, buffers of matrix products) is measured once on a machine, by a process of its own that trains
an embedded base.
"""

from __future__ import annotations

import subprocess
import sys

from weft import measured
from weft.assets import instructions_path
from weft.errors import UserError
from weft.files.whole import temporary_place
from weft.machine import resident


def growth(quantization: str | None) -> int:
    """The bytes that loading a base and the first step add to a process that has read its data.

    Raises:
        UserError: The process that measures it does not end as it should.
    """
    known = measured.recall("library")
    name = str(quantization)
    if name not in known:
        known[name] = _measured(name)
        measured.keep("library", known)
    return int(known[name])


def _measured(quantization: str) -> float:
    done = subprocess.run([sys.executable, "-m", __name__, quantization], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the memory that libraries take could not be measured: {done.stderr[-500:]}")
    return float(done.stdout.split()[-1])


def _train(quantization: str) -> int:
    """Train an embedded base for two steps; returns what the process has grown by since it had read its data."""
    from weft.planning.rehearsal import material
    from weft.training.config import make_config
    from weft.training.run import train

    with temporary_place() as folder:
        config = make_config(
            {
                "model": "tiny-llama", "data": str(instructions_path("train")), "limit": 64, "method": "lora",
                "steps": 2, "output_dir": str(folder / "run"), "device": "cpu", "dtype": "bfloat16",
                "quantization": None if quantization == "None" else quantization,
            }
        )  # fmt: skip
        before = material(config).resident
        train(config)
    return resident(most=True) - before


if __name__ == "__main__":
    print(_train(sys.argv[1]))
