"""What comes of one method on one configuration."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.architecture_truth import first_line
from tests.kit import sha256
from torch import nn

from weft.errors import UserError


@dataclass
class Cell:
    """What came of one method on one configuration (or of the plain base): problems, and what could not be compared."""

    path: str = ""
    refused: str = ""
    crash: str = ""
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def equal(self, what: str, gap: float, limit: float) -> None:
        """Note ``what`` as wrong if ``gap`` is over the limit."""
        if not gap <= limit:
            self.wrong.append(f"{what} by {gap:.2g}")

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """An exception in the body is this cell's crash; what comes after it is still checked. A refusal passes."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            text = f"{what}: {type(error).__name__} at {where}: {first_line(error)}"
            self.crash = self.crash or text

    @property
    def outcome(self) -> str:
        """``stream``, ``padded``, ``refused: ...``, ``WRONG: ...`` or ``CRASH: ...``."""
        if self.wrong:
            more = f"; CRASH: {self.crash}" if self.crash else ""
            return f"WRONG: {'; '.join(self.wrong)}{more}"
        if self.crash:
            return f"CRASH: {self.crash}"
        return f"refused: {self.refused}" if self.refused else self.path

    def as_json(self) -> dict[str, Any]:
        """For the file of results."""
        return {"outcome": self.outcome, "notes": self.notes}


def picture(model: nn.Module) -> dict[str, Any]:
    """All of a model that ``close`` must give back."""
    return {
        "classes": [(path, type(module)) for path, module in model.named_modules()],
        "attributes": [(path, sorted(module.__dict__)) for path, module in model.named_modules()],
        "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "training": [(path, module.training) for path, module in model.named_modules()],
        "attention": model.config._attn_implementation,  # type: ignore[union-attr]
        "tensors": sha256(model.state_dict().values()),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }
