"""Loads a model and its processor from a directory, a Hub id, or the package's own checkpoint."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from video_ma2mba import BUNDLED_CHECKPOINT

if TYPE_CHECKING:
    from video_ma2mba import VideoQuestionAnsweringPipeline

_KINDS = {
    "video_ma2mba": "Video-Ma2mba model",
    "videomamba": "VideoMamba classifier",
    "videomamba_retrieval": "retrieval model of VideoMamba",
}
_RELEASED = "llava_mamba"  # is converted into the first kind
BUNDLED_CLASSIFIER = Path(__file__).parent / "world" / "bundled_classifier"
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def check_loading(
    model: str | None, device: str = "auto", dtype: str = "auto", times: bool = False, kind: str | None = None
) -> None:
    """Refuse what cannot be loaded before torch and transformers are imported, which takes seconds.

    Args:
        times: the model will be asked for times.
        kind: `model_type` that a directory must hold, with its weights; None is any, and its weights are not needed.

    Raises:
        FileNotFoundError: there is no such model, or it has no weights. ValueError: a name of a model, device or type
            that means nothing; a directory's damaged files, or model of another kind; times that it never learnt.
    """
    folder = _named_folder(model)
    if model is not None and os.path.isdir(folder):
        _check_folder(Path(folder), kind)
    elif model is not None and "HF_HUB_OFFLINE" not in os.environ and not _hub_has_a_name():
        # What the cache holds loads at once; asked all the same, the Hub would be tried for half a minute a file.
        os.environ["HF_HUB_OFFLINE"] = "1"
    if times:
        _check_times(Path(folder, "processor_config.json"))
    _check_device(device)
    _dtype_name(dtype)


def _check_classifier(source: str, architectures: list[str] | None) -> None:
    """Refuse a VideoMamba model whose configuration names no class with a head."""
    if not any("ForVideoClassification" in name for name in architectures or ()):
        raise ValueError(
            f"{source} is a VideoMamba encoder without a classifier: fine-tune it, or convert another file"
        )


def _check_folder(folder: Path, kind: str | None) -> None:
    """Refuse a directory whose files are damaged, whose model is of another kind, or that lacks weights."""
    fields = _json_of(folder / "config.json")
    if not isinstance(fields, dict) or not fields.get("model_type"):
        raise ValueError(f"{folder / 'config.json'} names no model_type: this is no model that transformers loads")
    if kind and fields["model_type"] not in (kind, _RELEASED):
        raise ValueError(f"{folder} holds a model of the type {fields['model_type']}, not a {_KINDS[kind]}")
    for names in ("*config.json", "tokenizer.json", "*.index.json"):  # others may lie there, whatever is in them
        for file in sorted(folder.glob(names)):
            _json_of(file)
    if kind is None:
        return
    if kind == fields["model_type"] == "videomamba":
        _check_classifier(str(folder), fields.get("architectures"))
    if kind == "video_ma2mba" and fields["model_type"] == kind and not any(folder.glob("*processor_config.json")):
        raise FileNotFoundError(f"{folder} holds no processor_config.json: save the processor beside the model")
    from safetensors import SafetensorError, safe_open

    weights = sorted(folder.glob("model*.safetensors"))
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise FileNotFoundError(f"{folder} holds no weights (model.safetensors, or pytorch_model.bin)")
    for file in weights:
        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged, or was not copied to its end: {error}") from None


def _hub_has_a_name() -> bool:
    """Whether the Hub's name leads to a computer, or a proxy is there to know; without a network it does not."""
    if any(name.lower() in ("https_proxy", "http_proxy", "all_proxy") for name in os.environ):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _json_of(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged, it is not JSON: {error}") from None


def _check_times(file: Path) -> None:
    """ValueError where a processor's file says that it reads no times; files that are not there say nothing."""
    try:
        knows = json.loads(file.read_text(encoding="utf-8")).get("frame_times", "none")
    except (OSError, ValueError, AttributeError):
        return
    if knows == "none":
        from video_ma2mba.processing.frame_times import NO_TIMES

        raise ValueError(NO_TIMES)


def _check_device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"--device {device} is unknown: use auto, cpu, cuda, cuda:N or mps")


def _dtype_name(dtype: str, option: str = "--dtype", use: str = "auto, fp32, fp16 or bf16") -> str:
    """What PyTorch calls a type; "auto" stays as it is."""
    name = _DTYPES.get(dtype, dtype)
    if name not in _DTYPES.values() and not (name == "auto" and "auto" in use):
        raise ValueError(f"{option} {dtype} is unknown: use {use}")
    return name


def _named_folder(model: str | None) -> str:
    """Directory or Hub id that `--model` names."""
    if model is None:
        if not (BUNDLED_CHECKPOINT / "config.json").is_file():
            raise FileNotFoundError(
                f"the bundled checkpoint is missing from {BUNDLED_CHECKPOINT}: "
                "name a model with --model, or train it with `python -m video_ma2mba.world.train`"
            )
        return str(BUNDLED_CHECKPOINT)
    if not model:
        raise ValueError("--model is empty: name a directory or a Hub id, or leave it out")
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"model directory {model} holds no config.json: it is not a saved model")
    if path.is_file():
        raise FileNotFoundError(f"--model {model} is a file: name the directory that holds config.json")
    if not path.is_dir() and (not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith(".")):
        raise FileNotFoundError(f"model directory {model} does not exist (and it is no Hub id such as owner/name)")
    return str(path) if path.is_dir() else model


def resolve_model(model: str | None) -> str:
    """Directory or Hub id to load from; None is the bundled checkpoint.

    A checkpoint in the released layout is converted into the cache, once: see `usable_folder`.

    Raises:
        FileNotFoundError: the directory does not exist or holds no `config.json`.
        OSError, ValueError: the checkpoint cannot be fetched or converted.
    """
    folder = _named_folder(model)
    if model is None:
        return folder
    from video_ma2mba.conversion.released import usable_folder

    return usable_folder(folder)


def pick_device(device: str):
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` as a `torch.device`; `auto` is a GPU where there is one.

    Raises:
        ValueError: no such device on this machine.
    """
    _check_device(device)
    import torch

    mps = torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    picked = torch.device(device)
    if picked.type == "mps" and not mps:
        raise ValueError("--device mps: this machine, or its PyTorch, has no Metal GPU; use cpu or auto")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu or auto"
        )
    return picked


def join_ranks(device: str = "auto") -> str:
    """Meet the other processes that torchrun (or `accelerate launch`, or SLURM) started; returns this one's device.

    To be called before anything makes an Accelerator, as lmms-eval does: the first one decides, and without being told
    it takes several processes on CPU for one each. Whichever GPU `device` names, each process gets one of its own.

    Raises:
        ValueError: no such device on this machine, or fewer GPUs than processes.
    """
    from video_ma2mba.modeling_video_ma2mba.parallel_dims import ParallelDims

    if ParallelDims.of_run().world == 1:
        return device
    picked = pick_device(device)
    if device == "mps":
        raise ValueError("--device mps: several processes cannot share one Metal GPU; use cpu, or start one process")
    import torch
    from accelerate import Accelerator

    on_cuda, here = picked.type == "cuda", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_cuda and here > torch.cuda.device_count():
        raise ValueError(
            f"{here} processes were started on this machine, which has {torch.cuda.device_count()} CUDA devices: "
            "start as many, or pass --device cpu"
        )
    accelerator = Accelerator(cpu=not on_cuda)
    return str(accelerator.device) if on_cuda else "cpu"


@contextmanager
def shared_run(device: str = "auto") -> Iterator[tuple[str, Any, bool]]:
    """`join_ranks` for as long as something is shared out.

    Yields:
        the device of this process, the process group of all of them (None where this is the only one), and whether
        this is the one that writes files and messages.
    """
    from video_ma2mba.modeling_video_ma2mba.parallel_dims import ParallelDims

    device = join_ranks(device)
    if ParallelDims.of_run().world == 1:
        yield device, None, True
        return
    import torch
    from torch import distributed

    yield device, distributed.group.WORLD, ParallelDims.of_run().first
    # NCCL warns where it has to guess whose GPU waits.
    distributed.barrier(device_ids=[torch.cuda.current_device()] if device.startswith("cuda") else None)
    distributed.destroy_process_group()


def pick_dtype(dtype: str, device):
    """`auto` is bf16 on CUDA and fp32 elsewhere, where half precision is slower or less exact.

    Raises:
        ValueError: unknown name.
    """
    import torch

    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, _dtype_name(dtype))


def pick_state_dtype(state_dtype: str):
    """The `dtype` for `VideoState.save`: None for float32, which is as it is.

    Raises:
        ValueError: unknown name.
    """
    name = check_state_dtype(state_dtype)
    import torch

    return None if name == "float32" else getattr(torch, name)


def check_state_dtype(state_dtype: str) -> str:
    """What PyTorch calls the type of a state file; ValueError for an unknown name."""
    return _dtype_name(state_dtype, "--state-dtype", "float32, bfloat16 or float16")


def load_pipeline(
    model: str | None = None, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> VideoQuestionAnsweringPipeline:
    """The question-answering pipeline of a directory, a Hub id, or (None) the bundled checkpoint.

    Raises:
        FileNotFoundError, ValueError, OSError: there is no such model, it is of another kind, or it is incomplete.
    """
    source = resolve_model(model)
    picked = pick_device(device)

    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from video_ma2mba import VideoQuestionAnsweringPipeline

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        if source in str(error):
            raise
        raise OSError(f"{source} cannot be loaded: {error}") from error
    if config.model_type != "video_ma2mba":
        raise ValueError(f"{source} holds a model of the type {config.model_type}, not a Video-Ma2mba model")
    logging.disable_progress_bar()  # loading takes a moment; the bar belongs to the video
    loaded = AutoModelForImageTextToText.from_pretrained(
        source, config=config, dtype=pick_dtype(dtype, picked), trust_remote_code=trust_remote_code
    )
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    return VideoQuestionAnsweringPipeline(model=loaded.eval(), processor=processor, device=picked)


def load_classifier(
    model: str | None = None, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> Callable[..., list[dict[str, Any]]]:
    """A function from a video (`top`, `num_segments`, `num_crops`) to its classes, `[{"label", "score"}, ...]`.

    Args:
        model: directory or Hub id; None is the bundled classifier of the rendered world.

    Raises:
        FileNotFoundError, ValueError, OSError: there is no such model, it is of another kind, or it is incomplete.
    """
    source = resolve_model(str(BUNDLED_CLASSIFIER) if model is None else model)
    picked = pick_device(device)

    import torch
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForVideoClassification
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.utils import logging

    import video_ma2mba  # noqa: F401 (registers the classes)

    remote = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(source, **remote)
    if config.model_type != "videomamba":
        raise ValueError(f"{source} holds a model of the type {config.model_type}, not a VideoMamba classifier")
    _check_classifier(source, config.architectures)
    logging.disable_progress_bar()
    auto_class = AutoModelForVideoClassification if config.is_video else AutoModelForImageClassification
    loaded = auto_class.from_pretrained(source, config=config, dtype=pick_dtype(dtype, picked), **remote)
    loaded = loaded.eval().to(picked)
    processor = AutoVideoProcessor.from_pretrained(source, **remote)

    def classes(video: Any, top: int = 5, **views: int) -> list[dict[str, Any]]:
        pixels = processor(video, num_frames=config.num_frames, return_tensors="pt", **views)["pixel_values"]
        with torch.inference_mode():
            logits = loaded(pixels.to(picked)).logits[0].float().cpu()
        if not logits.isfinite().all():
            raise ValueError(
                f"{source} does not answer with numbers: its weights are damaged, or too large for {loaded.dtype}"
            )
        scores = {"regression": lambda x: x, "multi_label_classification": torch.sigmoid}.get(
            config.problem_type, lambda x: x.softmax(-1)
        )(logits)
        best = scores.topk(min(top, len(scores)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [{"label": config.id2label[number], "score": score} for score, number in pairs]

    return classes
