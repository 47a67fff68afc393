"""``weft serve``: an HTTP server in OpenAI's form for a run's adapters, for an adapter, or for a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.generation.target import Target
    from weft.serve.endpoints import Endpoints
    from weft.serve.metrics import Metrics
    from weft.serve.settings import ServeSettings


def serve(
    target: options.Target,
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter of the run to serve; may be repeated. Default: all.")
    ] = None,
    model: options.Model = None,
    model_name: Annotated[str | None, typer.Option(help="What clients call the base.")] = None,
    adapters_folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", parser=local_path, help="Let clients load and unload the adapters in it."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=local_path, help="API keys, one on each line (or WEFT_API_KEY)."),
    ] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="Name by which clients call; may be repeated.")] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="Web page that may ask, https://…; may be repeated.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Answers that are written at once.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait; more are refused with 429.")] = 256,
    cache_gb: Annotated[float | None, typer.Option(min=0.0, help="Memory for keys and values (what fits).")] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds after which an answer is ended.")] = 600.0,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds for running answers after SIGTERM.")] = 30.0,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write the texts of prompts into the log.")
    ] = False,
    chat_template: options.ChatTemplate = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> int:
    """Answer over HTTP, in OpenAI's form, with the base and all its adapters at once.

    weft serve runs/weft --port 8000
    """
    from weft.serve.settings import ServeSettings, check_packages, read_keys

    check_packages()
    settings = ServeSettings(
        host=host,
        port=port,
        keys=read_keys(api_key_file),
        allowed_hosts=tuple(allowed_host or ()),
        allowed_origins=tuple(allowed_origin or ()),
        adapters_folder=adapters_folder,
        model_name=model_name,
        max_rows=max_rows,
        max_waiting=max_waiting,
        cache_bytes=None if cache_gb is None else int(cache_gb * 1e9),
        request_timeout=timeout,
        grace=grace,
        log_prompts=log_prompts,
    )
    how: dict[str, Any] = {"model": model, "adapters": adapter, "device": device, "dtype": dtype}
    early.refuse(lambda: _open(target, how, chat_template))
    common.tell_hub(model or target)
    return _run(settings, lambda: _open(target, how, chat_template))


def _open(target: str, how: dict[str, Any], chat_template: str | None) -> Target:
    from weft.generation.open import open_target

    return open_target(target, **how, chat_template=options.template_text(chat_template))


def _run(settings: ServeSettings, open_it: Callable[[], Target]) -> int:
    """Listen, load, and serve until a signal comes."""
    from weft.serve.access_log import show_access
    from weft.serve.server import address, listen, run

    listening = listen(settings)
    url = address(settings, listening)
    show_access()

    def load(metrics: Metrics) -> Endpoints:
        common.say(f"listening on {url}; loading …")  # from here on a signal is heard
        with common.no_collection():
            from weft.serve.loading import make_endpoints

            opened = open_it()
        for note in (*opened.notes, opened.summary()):
            common.say(note)
        return make_endpoints(opened, settings, metrics)

    def ready(endpoints: Endpoints) -> None:
        names = ", ".join(one.name for one in endpoints.service.registry.models())
        common.say(f"ready: {url}/v1 serves {names}")

    whole = run(settings, listening, load, ready)
    common.say("ended." if whole else "ended; answers that were still being written were cut.")
    return common.DONE if whole else common.TERMINATED
