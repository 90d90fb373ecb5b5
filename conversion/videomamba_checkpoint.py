"""Released VideoMamba checkpoints (`.pth` files) into this package's layout, resized and inflated, and back.

Every tensor is accounted for. What a file holds beside its model (decoders of pre-training, teachers) is kept in a
file of its own, so that the way back loses nothing.
"""

import fnmatch
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..files.text_files import check_text, read_json, text_lines
from ..hub_cards.retrieval_card import retrieval_card
from ..hub_cards.videomamba_card import videomamba_card
from ..modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from ..modeling_video_ma2mba.modeling_videomamba import VideoMambaForVideoClassification, VideoMambaModel
from ..modeling_video_ma2mba.modeling_videomamba_retrieval import VideoMambaForRetrieval
from .report import ConversionError, ConversionReport, TensorRow
from .tensor_store import load_pickle
from .videomamba_retrieval import retrieval_config, retrieval_names

RECORD, BESIDE = "conversion.json", "other_tensors.safetensors"
RELEASED = "OpenGVLab/VideoMamba/"  # whose licence is known
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/((?:[\w.-]+/)*[\w.-]+\.pth)")
_KINDS = {
    VideoMambaForVideoClassification: "classifier",
    VideoMambaModel: "encoder",
    VideoMambaForRetrieval: "retrieval model",
}
_NESTS = ("model", "module", "state_dict")
_PREFIXES = ("", "module.", "backbone.", "encoder.", "vision_encoder.", "module.vision_encoder.")
_BESIDE = re.compile(
    r"^(?:module\.)?(?:vision_encoder\.)?(?:clip_decoder|pool_norm|distill_head|text_encoder|vision_proj|text_proj|temp$|"
    r"itm_head|clip_teacher)"
)


def convert_videomamba(
    source: str,
    out: Path,
    *,
    num_frames: int | None = None,
    image_size: int | None = None,
    tubelet_size: int = 1,
    inflate: str = "center",
    labels: Path | None = None,
    leave_out: Sequence[str] = (),
    dry_run: bool = False,
) -> ConversionReport:
    """Write a directory that the auto classes load: a classifier where the file has a head, a retrieval model where it
    has a text encoder, else the encoder.

    Args:
        source: a `.pth` file, or `owner/name/file.pth` on the Hub. Dictionaries nested under `model`, `module` or
            `state_dict`, also in each other, and prefixed names are understood.
        num_frames: frames of a clip, if others than the file's: temporal positions are interpolated linearly. For an
            image model: makes it a video model; its patch embedding is inflated and its head left aside.
        image_size: side of frames in pixels, if another: spatial positions are interpolated (bicubic).
        tubelet_size: frames a token spans, for an image model that becomes a video model.
        inflate: "center" (all of the kernel on the tubelet's middle frame) or "mean".
        labels: names of the classes: lines of text, or a JSON list or object (by number). Without: LABEL_0, ...
        leave_out: patterns of tensors that may be dropped although nothing is known of them.
        dry_run: check everything and write nothing.

    Returns:
        What became of every tensor; also in `out/conversion.json`.

    Raises:
        ConversionError: tensors are missing, unknown or of other shapes than the rest says.
        ValueError: wrong arguments, no plain tensors, or a wrong number of labels.
        OSError: no such file, or it cannot be fetched.
    """
    if not dry_run and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory: choose another")
    if inflate not in ("center", "mean"):
        raise ValueError(f"inflate={inflate!r} is not valid: use 'center' or 'mean'")
    stored, nest = _load(source)
    prefix = next((p for p in _PREFIXES if f"{p}patch_embed.proj.weight" in stored), None)
    if prefix is None:
        raise ConversionError(source, {"missing": ["patch_embed.proj.weight"]}, "it is no VideoMamba checkpoint")
    names, beside, dropped = _split_tensors(source, stored, prefix, leave_out)
    tensors = {own: stored[name] for name, own in names.items()}
    config = _config(source, tensors)
    if num_frames is not None and not config.is_video:
        for own in ("head.weight", "head.bias"):
            if own in tensors:
                name = next(n for n, o in names.items() if o == own)
                del tensors[own], names[name]
                beside[name] = stored[name]
        config.num_labels = 0
    if tubelet_size != 1 and (config.is_video or num_frames is None):
        is_one = (
            f"is a video model, {config.tubelet_size} frames a token" if config.is_video else "stays one of pictures"
        )
        raise ValueError(f"--tubelet {tubelet_size} is for a model of pictures that --num-frames makes one of videos, "
                         f"but {source} {is_one}")  # fmt: skip
    config = resize_clips(config, tensors, num_frames, image_size, tubelet_size, inflate)
    has_head = "head.weight" in tensors
    if labels is not None:
        _name_classes(config, labels, tensors.get("head.weight"), source)
    mates, copies = retrieval_names(beside)
    kind: Any = VideoMambaForVideoClassification if has_head else VideoMambaModel
    if mates:
        tensors |= {own: beside[name] for name, own in mates.items()}
        config, kind = retrieval_config(config, tensors), VideoMambaForRetrieval
    model = _check(source, kind, config, tensors)

    rows = [TensorRow(n, "kept" if n == o else "renamed", o, str(stored[n].dtype), tuple(stored[n].shape))
            for n, o in names.items()]  # fmt: skip
    for name, own in mates.items():
        kept = "kept" if name == own else "renamed"
        rows.append(TensorRow(name, kept, own, str(stored[name].dtype), tuple(stored[name].shape)))
        del beside[name]
    for name, other in copies.items():
        own = mates[other]
        rows.append(TensorRow(name, "tied", own, str(stored[name].dtype), tuple(stored[name].shape)))
        del beside[name]
    names |= mates
    rows += [TensorRow(n, "kept beside", n, str(t.dtype), tuple(t.shape)) for n, t in beside.items()]
    rows += [TensorRow(n, "left over", None, str(stored[n].dtype), tuple(stored[n].shape)) for n in dropped]
    report = ConversionReport([source], [f"VideoMamba {_KINDS[kind]}"], rows)
    report.parameters = sum(t.numel() for t in tensors.values())
    report.nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    if dry_run:
        return report
    record = report.to_dict() | {"way_back": {"nest": nest, "names": names, "copies": copies}}
    _write(out, model, tensors, beside, record, source)
    return report


def read_videomamba(folder: Path, shown: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration's fields and all weights of a directory of ours, which messages call `shown`.

    Raises:
        FileNotFoundError: it lacks one of them. ValueError: it holds no VideoMamba.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{shown} holds no config.json: it is no checkpoint of this package")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if fields.get("model_type") not in ("videomamba", "videomamba_retrieval"):
        raise ValueError(f"{shown} holds a model of the type {fields.get('model_type')!r}, not a VideoMamba")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{shown} holds no weights (model.safetensors)")
    return fields, {name: tensor for file in files for name, tensor in load_file(file).items()}


def restore_videomamba(folder: Path, out: Path) -> int:
    """Write a directory of ours as a `.pth` file: with the names, nesting and other tensors of the file it came from
    where it was converted, else plain names under `model`. Returns the number of tensors.

    Raises:
        ValueError: `out` exists, or the directory holds no VideoMamba.
        FileNotFoundError: no such directory, or without weights.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another name")
    _, stored = read_videomamba(folder, str(folder))
    own = {name.removeprefix("videomamba.").removeprefix("vision_encoder."): t for name, t in stored.items()}
    record = json.loads((folder / RECORD).read_text(encoding="utf-8")) if (folder / RECORD).is_file() else {}
    way = record.get("way_back") or {"nest": "model", "names": {}}
    official = {ours: name for name, ours in way["names"].items()}
    prefix = next((n.removesuffix("cls_token") for o, n in official.items() if o == "cls_token"), "")
    tensors = {official.get(name, prefix + name): tensor for name, tensor in own.items()}
    tensors |= {name: tensors[other] for name, other in way.get("copies", {}).items()}
    if (folder / BESIDE).is_file():
        tensors |= load_file(folder / BESIDE)
    nested: dict[str, Any] = tensors
    for key in reversed(way["nest"].split(".") if way["nest"] else []):
        nested = {key: nested}
    torch.save(nested, out)
    return len(tensors)


def _load(source: str) -> tuple[dict[str, Tensor], str | None]:
    """Tensors by their stored names, and the keys they were nested under, with dots between them."""
    path = Path(source).expanduser()
    if not path.is_file():
        hub = _HUB_FILE.fullmatch(source)
        if hub is None or path.is_absolute() or source.startswith("."):
            raise FileNotFoundError(f"{source}: no such file (and no file of the Hub such as owner/name/file.pth)")
        path = _fetch(*hub.groups())
    tensors, nests = load_pickle(path, source), []
    while isinstance(tensors, dict) and (key := next((k for k in _NESTS if isinstance(tensors.get(k), dict)), None)):
        tensors = tensors[key]
        nests.append(key)
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{source} holds other things than named tensors: it is no VideoMamba checkpoint")
    return tensors, ".".join(nests) or None


def _fetch(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file))
    except (OSError, ValueError) as error:
        raise OSError(
            f"{file} cannot be fetched from the Hub's {repo}: download "
            f"https://huggingface.co/{repo}/resolve/main/{file} where there is a network, and give its path "
            f"({str(error).strip().splitlines()[0]})"
        ) from error


def _split_tensors(
    source: str, stored: dict[str, Tensor], prefix: str, leave_out: Sequence[str]
) -> tuple[dict[str, str], dict[str, Tensor], list[str]]:
    """Stored name -> ours for encoder and head; tensors kept beside; names left over."""
    names: dict[str, str] = {}
    beside, dropped, unknown, twice = {}, [], [], []
    for name, tensor in stored.items():
        own = name.removeprefix(prefix) if name.startswith(prefix) else name
        if own in ("norm.weight", "norm_f.weight"):
            own = "norm_f.weight"
        known = re.fullmatch(
            r"cls_token|pos_embed|temporal_pos_embedding|patch_embed\.proj\.(weight|bias)|norm_f\.weight|"
            r"head\.(weight|bias)|layers\.\d+\.norm\.weight|layers\.\d+\.mixer\.[\w.]+",
            own,
        )
        if known and (name.startswith(prefix) or own.startswith("head.")):
            if own in names.values():
                twice.append(f"{name}, beside {next(n for n, o in names.items() if o == own)}")
            names[name] = own
        elif _BESIDE.match(name):
            beside[name] = tensor
        elif any(fnmatch.fnmatch(name, pattern) for pattern in leave_out):
            dropped.append(name)
        else:
            unknown.append(name)
    if unknown or twice:
        advice = "--leave-out drops tensors by pattern" if unknown else ""
        raise ConversionError(source, {"unknown": unknown, "there twice": twice}, advice)
    return names, beside, dropped


def _config(source: str, tensors: dict[str, Tensor]) -> VideoMambaConfig:
    """What the tensors' shapes say."""
    first = "layers.0.mixer."
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", first + "A_log", first + "conv1d.weight",
              first + "dt_proj.weight")  # fmt: skip
    if missing := [name for name in needed if name not in tensors]:
        raise ConversionError(source, {"missing": missing})
    width, kernel = tensors["cls_token"].shape[-1], tensors["patch_embed.proj.weight"]
    inner, state = tensors["layers.0.mixer.A_log"].shape
    side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    if side**2 != tensors["pos_embed"].shape[1] - 1:
        raise ConversionError(source, {"mis-shaped": ["pos_embed: not one position more than a square"]})
    tubelet = kernel.shape[2] if kernel.ndim == 5 else None
    temporal = tensors.get("temporal_pos_embedding")
    head = tensors.get("head.weight")
    return VideoMambaConfig(
        hidden_size=width,
        num_hidden_layers=1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("layers.")),
        state_size=state,
        expand=inner // width,
        conv_kernel=tensors["layers.0.mixer.conv1d.weight"].shape[-1],
        time_step_rank=tensors["layers.0.mixer.dt_proj.weight"].shape[-1],
        image_size=side * kernel.shape[-1],
        patch_size=kernel.shape[-1],
        num_channels=kernel.shape[1],
        tubelet_size=tubelet,
        num_frames=(temporal.shape[1] if temporal is not None else 8) * (tubelet or 1),
        num_labels=0 if head is None else len(head),
        problem_type="regression" if head is not None and len(head) == 1 else None,  # likes and views of LVU
    )


def resize_clips(
    config: VideoMambaConfig,
    tensors: dict[str, Tensor],
    num_frames: int | None,
    image_size: int | None,
    tubelet_size: int = 1,
    inflate: str = "center",
) -> VideoMambaConfig:
    """Change `tensors` (an encoder's, without prefix) in place to clips of another size: spatial positions bicubic,
    temporal ones linear, an image model's patch embedding inflated where `num_frames` is given ("center" or "mean").

    Returns:
        Their configuration.
    """
    fields = config.to_dict()
    becomes_video = num_frames is not None and not config.is_video
    if image_size is not None:
        fields["image_size"] = image_size
    if becomes_video:
        fields["tubelet_size"] = tubelet_size
    if num_frames is not None:
        fields["num_frames"] = num_frames
    wanted = VideoMambaConfig.from_dict(fields)  # which refuses what cannot be
    if wanted.image_size != config.image_size:
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], wanted.image_size // wanted.patch_size)
    if becomes_video:
        kernel = tensors["patch_embed.proj.weight"]
        inflated = kernel.unsqueeze(2).repeat(1, 1, tubelet_size, 1, 1)
        if inflate == "center":
            middle = torch.zeros(tubelet_size).index_fill(0, torch.tensor(tubelet_size // 2), 1)
            inflated = inflated * middle.to(kernel.dtype).view(1, 1, -1, 1, 1)
        else:
            inflated = inflated / tubelet_size
        tensors["patch_embed.proj.weight"] = inflated
    if wanted.is_video:
        frames, width = wanted.grid[0], wanted.hidden_size
        before = tensors.get("temporal_pos_embedding")
        if before is None:  # as before any training on videos
            tensors["temporal_pos_embedding"] = torch.zeros(1, frames, width, dtype=tensors["cls_token"].dtype)
        elif before.shape[1] != frames:
            moved = F.interpolate(before.float().transpose(1, 2), size=frames, mode="linear", align_corners=False)
            tensors["temporal_pos_embedding"] = moved.transpose(1, 2).to(before.dtype)
    return wanted


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Spatial positions (1, 1 + P, C) for `side` x `side` patches: bicubic, the class token's stays."""
    first, patches = positions[:, :1], positions[:, 1:]
    old = math.isqrt(patches.shape[1])
    grid = patches.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], dim=1)


def read_class_names(path: Path) -> list[str]:
    """Names of classes by number: lines of text, or JSON: a list, names by number, or numbers by name.

    Raises:
        ValueError: it is none of these, or the numbers are not 0, 1, ... OSError: it cannot be read.
    """
    if path.suffix.lower() != ".json":
        lines = [line.strip() for line in text_lines(path)]
        try:
            check_text("".join(lines))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return [line for line in lines if line]
    found = read_json(path)
    if isinstance(found, list) and all(isinstance(name, str | int) for name in found):
        return [str(name) for name in found]
    if isinstance(found, dict):
        pairs = [(k, v) if re.fullmatch(r"\d+", k) else (v, k) for k, v in found.items()]
        by_number = {int(k): v for k, v in pairs if re.fullmatch(r"\d+", str(k)) and isinstance(v, str)}
        if sorted(by_number) == list(range(len(found))):
            return [by_number[number] for number in range(len(found))]
    raise ValueError(
        f'{path} must be a list of names, or {{"0": name, ...}} or {{name: 0, ...}} with every number once'
    )


def _name_classes(config: VideoMambaConfig, path: Path, head: Tensor | None, source: str) -> None:
    names = read_class_names(path)
    if head is None:
        raise ValueError(f"{source} has no head, or loses it with its pictures: there are no classes to name")
    if len(names) != len(head):
        raise ValueError(f"{path} names {len(names)} classes, the head of {source} has {len(head)}")
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in config.id2label.items()}


def _check(source: str, kind: Any, config: Any, tensors: dict[str, Tensor]) -> Any:
    """A model without weights for `config`, after comparing its tensors with these."""
    with torch.device("meta"):
        model = kind(config)
    shapes_of = {name: tensor.shape for name, tensor in model.named_parameters()}  # each once
    wanted = {name.removeprefix("videomamba.").removeprefix("vision_encoder."): s for name, s in shapes_of.items()}
    shapes = [f"{n} is {list(tensors[n].shape)} instead of {list(s)}" for n, s in wanted.items()
              if n in tensors and tensors[n].shape != s]  # fmt: skip
    problems = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - wanted.keys()),
        "mis-shaped": shapes,
    }
    if any(problems.values()):
        raise ConversionError(source, problems)
    return model


def _write(
    out: Path,
    model: Any,
    tensors: dict[str, Tensor],
    beside: dict[str, Tensor],
    record: dict[str, Any],
    source: str,
) -> None:
    from video_ma2mba.processing.video_processing_videomamba import VideoMambaVideoProcessor

    config = model.config
    retrieval = hasattr(config, "vision_config")
    clips = config.vision_config if retrieval else config
    start = "vision_encoder." if retrieval else "" if isinstance(model, VideoMambaModel) else "videomamba."
    mates = {name for name, _ in model.named_parameters()} & tensors.keys()  # named as they are, no part of an encoder
    # Copies: a file may hold two names of one piece of memory, which safetensors do not.
    state = {
        (n if n in mates else start + n): t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()
    }
    model.to(tensors["cls_token"].dtype)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, state_dict=state)
    VideoMambaVideoProcessor(
        clips.image_size, clips.num_frames, image_mean=clips.image_mean, image_std=clips.image_std
    ).save_pretrained(out)
    if beside:
        save_file({name: tensor.clone().contiguous() for name, tensor in beside.items()}, out / BESIDE)
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    said: dict[str, Any] = {
        "title": out.resolve().name,
        "license": "apache-2.0" if source.startswith(RELEASED) else None,
        "source": source if source.startswith(RELEASED) else Path(source).name,
    }
    if retrieval:
        card = retrieval_card(config, parameters, **said)
    else:
        card = videomamba_card(config, parameters, classifier=not isinstance(model, VideoMambaModel), **said)
    (out / "README.md").write_text(card, encoding="utf-8")
