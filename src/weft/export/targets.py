"""What `weft verify` may be given: checks that need no large library."""

from __future__ import annotations

from pathlib import Path

from weft.errors import UserError
from weft.export.gguf_file import check_library
from weft.export.sources import adapter_folder
from weft.files.adapter_folder import is_adapter
from weft.files.run_folder import RUN_FILE
from weft.models.load import resolve_model
from weft.paths import local_path


def is_address(target: str) -> bool:
    """Whether it is the address of a server."""
    return target.startswith(("http://", "https://"))


def is_gguf(target: str) -> bool:
    """Whether it is a GGUF file."""
    return target.endswith(".gguf")


def is_adapted(folder: Path) -> bool:
    """Whether the folder holds a run or an adapter, and not a model by itself."""
    return (folder / RUN_FILE).is_file() or is_adapter(folder)


def check_target(target: str) -> None:
    """Refuse what cannot be compared.

    Raises:
        UserError: It is a run of several adapters, or not there.
    """
    if is_address(target):
        return
    folder = local_path(target)
    if is_gguf(target):
        check_library()
        if not folder.is_file():
            raise UserError(f"there is no file {target}.")
        with folder.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{target} is no GGUF file.")
    elif is_adapted(folder):
        adapter_folder(folder)
    else:
        resolve_model(target)


def check_pair(
    a: str, b: str, *, model: str | None = None, quantization: str | None = None, api_key_env: str | None = None
) -> None:
    """Refuse two sides of which neither can be measured, and options that neither side has a use for.

    Raises:
        UserError: One of them cannot be compared, both are servers, or an option does nothing.
    """
    for target in (a, b):
        check_target(target)
    if is_address(a) and is_address(b):
        raise UserError(
            f"{a} and {b} are both servers. One of the two must be a model on this machine, for what rounding explains "
            "is measured on it."
        )
    if quantization is not None and (is_address(b) or is_gguf(b)):
        what = "a server" if is_address(b) else "a GGUF file"
        raise UserError(f"--quantization is for how B is loaded, and B is {what}. Leave it out.")
    if model is not None and not any(not is_address(one) and is_adapted(local_path(one)) for one in (a, b)):
        raise UserError("--model is the base of an adapter, and neither side is one. Leave it out.")
    if api_key_env is not None and not (is_address(a) or is_address(b)):
        raise UserError("--api-key-env is for a server, and neither side is one. Leave it out.")
