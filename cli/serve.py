"""`video-ma2mba serve`: an OpenAI-compatible server that reads a video once and keeps it by an id."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, Model, SaveEvery, TrustRemoteCode


def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.", min=0, max=65535)] = 8000,
    states: Annotated[Path, typer.Option(help="Folder that keeps the videos' states.")] = Path("states"),
    max_states_gb: Annotated[
        float | None,
        typer.Option(help="Of all states together: those unused the longest go.", show_default="no bound"),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys, one a line; each sees its own videos.", show_default="nobody needs a key"),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes, each with a model; they share the states.", min=1)] = 1,
    allow_url: Annotated[
        list[str] | None,
        typer.Option(
            help="Fetch videos from addresses that begin so, from this host, or * (any).", show_default="none"
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Let pages of this origin use the server.", show_default="none")
    ] = None,
    max_upload_mb: Annotated[float, typer.Option(help="Largest file.", min=0.001)] = 4096.0,
    max_seconds: Annotated[float, typer.Option(help="Longest video.", min=1)] = 86400.0,
    max_batch: Annotated[int, typer.Option(help="Answers made at once.", min=1)] = 64,
    max_queue: Annotated[int, typer.Option(help="Videos that may wait to be read.", min=1)] = 64,
    memory_gb: Annotated[float, typer.Option(help="Of states kept ready for questions.", min=0)] = 2.0,
    save_every: SaveEvery = 10.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve videos and questions over HTTP as OpenAI's API does; a video is read once, whatever is asked of it.

    Only this machine is served, no addresses are fetched and no key is needed unless options say otherwise.
    """
    try:
        from video_ma2mba.serving import launch
        from video_ma2mba.serving.guard import LOOPBACK
        from video_ma2mba.serving.settings import ServerSettings
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("video_ma2mba"):
            raise
        raise ImportError(
            f"the server needs {error.name}: pip install 'video-ma2mba[serve]'", name=error.name
        ) from None
    from video_ma2mba.loading import check_loading, resolve_model

    if max_states_gb is not None and not max_states_gb > 0:
        raise ValueError(f"--max-states-gb must be more than 0, not {max_states_gb:g}")
    check_loading(model, device, dtype, kind="video_ma2mba")
    settings = ServerSettings(
        model=resolve_model(model) if workers > 1 else model,  # what has to be converted is converted once
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        states=str(states),
        max_states_bytes=None if max_states_gb is None else int(max_states_gb * 1e9),
        memory_bytes=int(memory_gb * 1e9),
        keys_file=None if api_key_file is None else str(api_key_file),
        allow_urls=allow_url or [],
        allow_origins=allow_origin or [],
        hosts=[*LOOPBACK] if host in LOOPBACK else [],
        max_upload_bytes=int(max_upload_mb * 1e6),
        max_seconds=max_seconds,
        max_batch=max_batch,
        most_waiting=max_queue,
        save_seconds=save_every,
    )
    launch.run(settings, host, port, workers)
