"""The model card of a run: what the model and the run themselves say, in the words of `hub_cards`."""

from __future__ import annotations

import datetime
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..hub_cards.checkpoint_facts import CheckpointFacts
from ..hub_cards.model_card import model_card, own_words, read_metadata
from ..modeling_video_ma2mba.state_video import VideoState
from ..modeling_video_ma2mba.state_writing import write_whole
from .parameter_groups import part_of

_PARTS = {"lm": "language model", "projector": "projector", "vision": "vision tower"}
_SETTINGS = (
    "train_parts",
    "labels",
    "learning_rate",
    "vision_learning_rate",
    "projector_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "fps",
    "max_frames",
    "max_length",
    "seed",
)
_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def facts_of(model: nn.Module, adapter: Mapping[str, Any] | None) -> CheckpointFacts:
    """What `hub_cards` reads from a saved folder, taken from the model in memory.

    Args:
        model: the Video-Ma2mba model, or a PEFT wrapper of it with `adapter` its configuration as plain data.
    """
    parameters: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    nbytes = 0
    for name, parameter in model.named_parameters():
        if adapter is not None and not parameter.requires_grad:
            continue
        parameters[_PARTS[part_of(name)]] += parameter.numel()
        dtypes[_SAFETENSORS_NAMES.get(str(parameter.dtype).removeprefix("torch."), str(parameter.dtype))] += (
            parameter.numel()
        )
        nbytes += parameter.nbytes
    state_bytes = 0
    if adapter is None:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        state_bytes = VideoState.zeros(model.config.text_config, device="meta", dtype=dtype).nbytes
    return CheckpointFacts(
        parameters=dict(parameters),
        dtypes=tuple(name for name, _ in dtypes.most_common()),
        weight_bytes=nbytes,
        config=None if adapter is not None else model.config,
        adapter=None if adapter is None else dict(adapter),
        state_bytes=state_bytes,
    )


def run_table(args: Any, state: Any, data: str | None, processes: int, settings: Sequence[str] = _SETTINGS) -> str:
    """How the model was trained, as a Markdown table of settings (of these names) and results."""
    rows = [] if data is None else [("data", data)]
    step = f"{state.global_step} of {state.max_steps}" if state.max_steps else str(state.global_step)
    rows += [("optimizer steps", step), ("epochs", f"{state.epoch or 0:.2f}")]
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    rows.append(("samples a step", f"{samples} on {processes} process{'es' if processes > 1 else ''}"))
    for name in settings:
        value = getattr(args, name, None)
        if value not in (None, -1):
            rows.append((name, getattr(value, "value", value)))
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    rows.append(("precision", precision))
    for name, text in (("loss", "last training loss"), ("eval_loss", "last evaluation loss")):
        found = [entry for entry in state.log_history if name in entry]
        if found:
            rows.append((text, f"{found[-1][name]:.4f} (step {found[-1]['step']})"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.use_cpu else "CPU"
    trl = f"TRL {version('trl')}, " if "trl" in sys.modules else ""
    versions = f"transformers {transformers.__version__}, {trl}PyTorch {torch.__version__}"
    rows += [("hardware", device), ("software", versions), ("date", datetime.date.today().isoformat())]
    return "| training | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def write_training_card(
    target: Path,
    model: nn.Module,
    args: Any,
    state: Any,
    *,
    name: str,
    adapter: Mapping[str, Any] | None,
    data: str | None,
    processes: int,
    tags: list[str],
) -> None:
    """Write the card to `target` (README.md); what an author added to an earlier one outside the table stays.

    A model that comes from a folder with a card takes over its licence, and the first thing that the card says of it.
    """
    source = str(getattr(model.config, "name_or_path", "") or "")
    base = args.base_model or (source if source.count("/") == 1 and not Path(source).exists() else None)
    if base is None and (adapter is not None or "lora" in tags):
        base = Path(source).name or "base-model"  # `push` asks for the Hub's name before it publishes
    metadata = read_metadata(target)
    metadata["tags"] = [*(metadata.get("tags") or []), *tags]
    title, words = own_words(target)
    origin = Path(source, "README.md")
    if origin.is_file() and origin.resolve() != target.resolve():
        metadata.setdefault("license", read_metadata(origin).get("license"))
        said = (own_words(origin)[1] or "").split("\n\n")[0].strip()
        if said and said not in (words or ""):
            words = "\n\n".join([f"Made from `{Path(source).name}`, of which its card says: {said}", words or ""])
    before, _, rest = (words or "").partition("| training | |")
    after = rest.partition("\n\n")[2] if rest else ""
    table = run_table(args, state, data, processes)
    text = model_card(
        facts_of(model, adapter),
        name,
        license=args.license or metadata.get("license") or "unknown",
        base_model=base,
        metadata=metadata,
        title=title,
        words="\n\n".join(part.strip() for part in (before, table, after) if part.strip()),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, text)
