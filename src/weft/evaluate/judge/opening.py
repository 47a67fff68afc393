"""Who judges, by the words of a command line: ``URL#MODEL``, or a target with ``#ADAPTER``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from weft.errors import UserError
from weft.export.targets import is_address
from weft.generation.open import open_target
from weft.generators.budget import Budget, Price
from weft.generators.generator import Generator
from weft.generators.ledger import Ledger
from weft.generators.server import Address, Patience, ServedGenerator, import_openai
from weft.paths import local_path


@dataclass(frozen=True, kw_only=True)
class JudgePlace:
    """Who judges, and what that may cost.

    Attributes:
        said: ``URL#MODEL`` of a server, or a run, an adapter or a model on this machine, with ``#ADAPTER``.
        key_env, key_file: where the server's key is.
    """

    said: str
    key_env: str | None = None
    key_file: Path | None = None
    budget: Budget = field(default_factory=Budget)
    price: Price = field(default_factory=Price)
    patience: Patience = field(default_factory=Patience)
    device: str = "auto"

    @property
    def served(self) -> bool:
        """Whether it is a server's."""
        return is_address(self.said)

    @property
    def model(self) -> str:
        """Its name, as far as it has one beside its place."""
        target, name = self._parts()
        return name or (target if self.served else local_path(target).name)

    def check(self) -> None:
        """Refuse what cannot judge; loads and asks nothing.

        Raises:
            UserError: The address names no model, the key or the package is missing, or an option does nothing.
        """
        if self.served:
            self._address()
            import_openai()
            return
        for name, value in (("--api-key-env", self.key_env), ("--api-key-file", self.key_file)):
            if value is not None:
                raise UserError(f"{name} is for a server, and the judge {self.said} is none. Leave it out.")

    def try_opening(self) -> None:
        """Open a target on this machine, for a process that stops where weights would be loaded.

        Raises:
            UserError: It cannot be opened.
        """
        if not self.served:
            open_target(self._parts()[0], device=self.device)

    def _address(self) -> Address:
        return Address.of(self.said, key_env=self.key_env, key_file=self.key_file)

    def _parts(self) -> tuple[str, str]:
        if not self.served and local_path(self.said).exists():
            return self.said, ""
        target, _, name = self.said.partition("#")
        return target, name

    @contextmanager
    def opened(self, ledger: Path | None) -> Iterator[Generator]:
        """The generator that judges, inside the block.

        Raises:
            UserError: It cannot be opened, or another process has the ledger.
        """
        if self.served:
            address = self._address()
            with Ledger(ledger) as book:
                yield ServedGenerator(
                    address, patience=self.patience, ledger=book, budget=self.budget, price=self.price
                )
            return
        from weft.generators.local import LocalGenerator

        target, name = self._parts()
        with Ledger(ledger) as book, open_target(target, device=self.device) as opened:
            chosen = name or (opened.names[0] if len(opened.names) == 1 else None)
            if chosen is None and opened.names:
                raise UserError(
                    f"{target} has several adapters: {', '.join(opened.names)}. Name the judge: {target}#NAME."
                )
            yield LocalGenerator(opened, chosen, ledger=book, budget=self.budget, price=self.price)
