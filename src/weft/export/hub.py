"""A folder on a hub, only where the user asks for it."""

from __future__ import annotations

import re
from pathlib import Path

from weft.errors import UserError, reason_of

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_repository(name: str) -> None:
    """Refuse what is no repository's name.

    Raises:
        UserError: It is none.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--push-to-hub {name}: expected OWNER/NAME, the repository that is made or filled.")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Put the files of a folder into a repository of the Hugging Face hub, which is made if it is not there.

    The hub's own login is used (``hf auth login``, or HF_TOKEN); Weft reads no token and writes none.

    Returns:
        The address of what was written.

    Raises:
        UserError: The hub refuses, or cannot be reached. The folder stays as it is.
    """
    check_repository(repository)
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Exported by Weft")
    except Exception as error:  # its client raises many kinds
        raise UserError(
            f"the hub did not take {folder} as {repository}: {reason_of(error)} The folder itself is written; later: "
            f"hf upload {repository} {folder}"
        ) from None
    return str(getattr(done, "commit_url", done))
