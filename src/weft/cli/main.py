"""The ``weft`` command: finds the verb, runs it, and turns what went wrong into one message and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import weft
from weft.cli import common
from weft.errors import UserError, nearest
from weft.extensions import load_extension

# What the machine refuses (disk full, no permission) is for the user to mend; any other OSError is a defect.
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG}

_LONGEST = 4000  # characters of a message

# Each has a module with a function of its name.
VERBS = (
    "train",
    "sweep",
    "watch",
    "preview",
    "rollouts",
    "plan",
    "chat",
    "generate",
    "judge",
    "serve",
    "eval",
    "combine",
    "merge",
    "export",
    "verify",
    "report",
    "compare",
    "convert",
    "doctor",
    "demo",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"weft {weft.__version__}")
        raise typer.Exit


def _weft(
    extension: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.py", help="Load methods, objectives, formats, callbacks of your own; repeatable."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and other libraries' messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fine-tune one frozen language model into many adapters, of any methods, in one pass."""


def _app(verb: str | None) -> typer.Typer:
    """Make the command with this verb; without one, with the names and descriptions of all verbs."""
    app = typer.Typer(
        name="weft",
        epilog=common.EPILOG,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        suggest_commands=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_weft)
    for name in VERBS if verb is None else (verb,):
        function = getattr(importlib.import_module(f"weft.cli.{name}"), name)
        app.command(name, help=function.__doc__, epilog=common.EPILOG)(function if verb else _listed)
    return app


def _listed() -> None:
    """Stand for a verb in the list of all. Its options are not looked for, which would take long."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; ``argv`` are the words after ``weft``."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Both options may stand anywhere: people add them to the end of the line that has just failed.
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not debug:
        common.quiet_libraries()
    common.open_streams()
    common.show_warnings()
    try:
        words = _load_extensions(words)
        code = typer.main.get_command(_app(_verb(words))).main(words, prog_name="weft", standalone_mode=False)
        sys.stdout.flush()  # what takes the output may be full
        return code if isinstance(code, int) else common.DONE
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # click's doing
            return common.PIPE_CLOSED
        return leaving.code if isinstance(leaving.code, int) else common.DEFECT
    except BrokenPipeError:
        return common.PIPE_CLOSED
    except BaseException as error:
        if debug and isinstance(error, Exception):
            traceback.print_exc()
        return _failure(error, as_json="--json" in words)
    finally:
        _let_go_of_output()


def _let_go_of_output() -> None:
    """Drop what the output does not take. Python would try once more as it leaves, and end with a code of its own."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _load_extensions(words: Sequence[str]) -> list[str]:
    """Load the files of every ``--extension FILE.py`` and give the words without them."""
    rest, found = [], iter(words)
    for word in found:
        option, equals, file = word.partition("=")
        if option != "--extension":
            rest.append(word)
            continue
        load_extension(file if equals else next(found, ""))
    return rest


def _verb(words: Sequence[str]) -> str | None:
    """The verb that the words begin with; None if an option stands before it, which then is all that counts.

    Raises:
        UserError: There is no such verb.
    """
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        raise UserError(f"there is no verb '{verb}'.{nearest(verb, VERBS)} Verbs: {', '.join(VERBS)}.")
    return verb if words[:1] == [verb] else None


def _failure(error: BaseException, *, as_json: bool) -> int:
    """Say what went wrong and give the exit code."""
    if isinstance(error, common.Interruption):
        common.say("interrupted before training began; nothing was written.")
        return 128 + error.signum
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        common.say("interrupted.")
        return common.INTERRUPTED
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        return common.USAGE
    message = _users_fault(error)
    code = common.USAGE
    if message is None:
        code = common.DEFECT
        message = f"{type(error).__name__}: {error}\nThis is a defect of Weft; --debug shows where it happened."
    if len(message) > _LONGEST:  # it may quote what a file holds
        message = f"{message[: _LONGEST - 200]} … {message[-200:]}"
    with contextlib.suppress(OSError):  # of an output that takes nothing, the code still tells
        common.say(f"error: {message}")
        if as_json:
            common.print_json({"error": message})
    return code


def _users_fault(error: BaseException) -> str | None:
    """The message for what the user can mend, or None for a defect."""
    if isinstance(error, UserError):
        return str(error)
    # typer brings its own copy of click or uses the installed one; both have this method.
    if hasattr(error, "format_message"):
        return _usage(error)
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
        return f"{error.filename or 'the output'}: {error.strerror}."
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        where = "memory" if isinstance(error, MemoryError) else "GPU memory"
        return (
            f"out of {where}. Take a smaller pack_tokens (the same steps, in more passes), a smaller max_length, fewer "
            f"jobs at once, or gradient_checkpointing: true. ({(str(error) or type(error).__name__).splitlines()[0]})"
        )
    return None


def _usage(error: Any) -> str:
    """The complaint of the argument parser, and where to look."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "weft"
    message = str(error.format_message()).rstrip()
    message += "" if message.endswith((".", "?", "!")) else "."
    option = str(getattr(error, "option_name", "")).lstrip("-")
    if option and command.endswith(" train"):
        message += f" Settings are written without dashes: {option.replace('-', '_')}=VALUE."
    return f"{message} See '{command} --help'."


if __name__ == "__main__":
    sys.exit(main())
