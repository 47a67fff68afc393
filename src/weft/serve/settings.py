"""The settings of a server, and the sentence for a package that is missing."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weft.errors import UserError
from weft.foreign import read_text

KEY_VARIABLE = "WEFT_API_KEY"
_SHORTEST_KEY = 8


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a server listens, what it lets in, and how long it waits.

    Attributes:
        host, port: Where it listens; port 0 takes a free one.
        keys: The API keys; none: whoever reaches the port may ask.
        allowed_hosts: Names by which clients may call the server, beside its addresses.
        allowed_origins: Web pages (``https://app.example``) whose scripts may ask.
        adapters_folder: The folder from which adapters are loaded while the server runs; None: none are.
        model_name: What the base is called; None: its folder's name or its hub id.
        max_rows: Answers that are written at once. ``max_waiting``: answers that may wait beside them.
        body_bytes: The longest body of a request.
        request_timeout: Seconds after which an answer is ended. ``grace``: seconds for running answers after SIGTERM.
        header_timeout, body_timeout, idle_timeout, write_timeout: Seconds that a slow client gets.
        stalled_after: Seconds without a step, while it has work, after which the engine counts as stuck.
        max_adapters: Adapters that may be there at once.
        log_prompts: Whether the access log holds the texts of prompts.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    adapters_folder: Path | None = None
    model_name: str | None = None
    max_rows: int = 64
    max_waiting: int = 256
    cache_bytes: int | None = None
    body_bytes: int = 1 << 20
    request_timeout: float = 600.0
    grace: float = 30.0
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    idle_timeout: float = 10.0
    write_timeout: float = 60.0
    stalled_after: float = 8.0
    max_adapters: int = 256
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.keys and not is_loopback(self.host):
            raise UserError(
                f"--host {self.host} lets other machines in, and there is no API key. Put one into the variable "
                f"{KEY_VARIABLE} or into a file (--api-key-file), or listen on 127.0.0.1."
            )
        if self.adapters_folder is not None and not self.adapters_folder.is_dir():
            raise UserError(f"--adapters-folder {self.adapters_folder} is no folder.")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Keys:
    """API keys, of which only hashes are kept. All are compared, each in a time that does not depend on the key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_hashed(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def __contains__(self, key: str) -> bool:
        given = _hashed(key)
        return any([hmac.compare_digest(given, known) for known in self._hashes])


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The keys of a file, one on each line, and that of the variable ``WEFT_API_KEY``, which is then removed.

    Raises:
        UserError: The file cannot be read or holds no key, or a key is too short or no plain text.
    """
    found = [(f"the variable {KEY_VARIABLE}", key) for key in (os.environ.pop(KEY_VARIABLE, None),) if key is not None]
    if file is not None:
        lines = [line.strip() for line in read_text(file).splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UserError(f"{file} holds no key; write one on each line.")
        found += [(str(file), key) for key in keys]
    for where, key in found:
        if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"{where}: a key must have {_SHORTEST_KEY} characters or more, of ASCII and without blanks."
            )
    return tuple(key for _, key in found)


def check_packages() -> None:
    """Refuse to begin without the packages of the server.

    Raises:
        UserError: One is missing.
    """
    try:
        import starlette
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f'weft serve needs packages ({error.name} is missing): pip install "weft[serve]".') from None
    del starlette
