"""Options that several verbs share, declared once: same names, same meaning, same help."""

from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(help="Model directory or Hub id.", show_default="the bundled checkpoint")]
Fps = Annotated[float | None, typer.Option(help="Frames read per second of video.", show_default="1")]
NumFrames = Annotated[
    int | None, typer.Option(help="Read this many frames, evenly spread, instead.", show_default=False)
]
Start = Annotated[float | None, typer.Option(help="Begin at this second.", show_default=False)]
End = Annotated[float | None, typer.Option(help="Stop at this second.", show_default=False)]
SaveEvery = Annotated[float, typer.Option(help="Seconds between saves of the unfinished state.", min=0)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (bf16 on CUDA, else fp32), fp32, fp16 or bf16.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code from the checkpoint.")]
StateDtype = Annotated[
    str, typer.Option(help="Of the file: float32 is exact; bfloat16 or float16 halve it, rounded.", metavar="TYPE")
]
