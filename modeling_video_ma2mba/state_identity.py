"""Which model and which processor a state belongs to: written into its metadata, compared before it is used again."""

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .stack_protocols import Processor, Reader
from .stack_weights import quantised_weights
from .state_version import PACKAGE_VERSION
from .vision_towers import tower_adapter

_SAMPLES = 1024
_MODEL_FIELDS = (
    *("video_token_id", "vision_feature_layer", "spatial_pool_stride", "spatial_pool_mode"),
    *("projector_hidden_act", "image_mean", "image_std"),
)
_TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "num_heads", "head_dim", "n_groups"),
    *("conv_kernel", "hidden_act", "layer_norm_epsilon", "residual_in_fp32", "time_step_limit"),
)

_RECORDED_SOURCES = 64
"""Videos that a state's metadata describe, the latest ones: a state appended to for days stays small."""
_SAMPLING = ("fps", "num_frames", "start", "end", "max_frames")


def identity_facts(model: PreTrainedModel, processor: Processor) -> dict[str, str]:
    """What the states of a model and a processor belong to: entries for a state's metadata.

    Weights and vocabulary are looked at again only after a change; their digests are kept on the model.
    """
    tokenizer = processor.tokenizer
    check_times(model.config, processor)
    # An optimizer's step counts up the versions of the parameters.
    versions = tuple((id(p), 0 if p.is_inference() else p._version) for p in model.parameters())
    words = (id(tokenizer), len(tokenizer))
    name = str(model.name_or_path)
    return {
        "package_version": PACKAGE_VERSION,
        "model": os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name,
        "revision": getattr(model.config, "_commit_hash", None) or "",
        "model_config": model_facts(model.config),
        "weights": _kept(model, "weights", versions, lambda: weights_digest(model)),
        "processor": processor_facts(
            processor, _kept(model, "vocabulary", words, lambda: vocabulary_digest(tokenizer))
        ),
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
    }


def check_times(config: Any, processor: Processor) -> None:
    """ValueError unless model and processor agree on how times are told."""
    there = config.frame_times, config.frame_times if config.frame_times == "none" else config.frame_times_every
    own = processor.frame_times
    here = own, own if own == "none" else processor.frame_times_every
    if there != here:
        raise ValueError(
            f"the model's configuration says frame_times={there[0]!r} (every {there[1]}), its processor {here[0]!r} "
            f"(every {here[1]}): set both alike, in config.json and processor_config.json"
        )


def _kept(model: torch.nn.Module, name: str, key: Hashable, make: Callable[[], str]) -> str:
    digests = model.__dict__.setdefault("_state_digests", {})
    if digests.get(name, (None,))[0] != key:
        digests[name] = key, make()
    return digests[name][1]


def source_facts(reader: Reader) -> dict[str, Any]:
    """A video's name, the digest of its bytes, and how its frames are chosen."""
    sampling = {name: getattr(reader.sampling, name) for name in _SAMPLING}
    facts = {"name": str(reader.name), "sha256": reader.content_digest(), **sampling}
    subtitles = getattr(reader, "subtitles", None)
    return facts if subtitles is None else {**facts, "subtitles": subtitles}


def continues(before: Mapping[str, str], source: Mapping[str, Any]) -> bool:
    """Whether a part of a video begins where the state of metadata `before` stopped in the same video."""
    last = (json.loads(before.get("sources", "[]")) or [{}])[-1]
    same = last.get("sha256") == source["sha256"] and (source["sha256"] or last.get("name") == source["name"])
    return bool(same) and "frame_time" in before and last.get("end") is not None and last["end"] == source["start"]


def record_source(
    metadata: dict[str, str], before: Mapping[str, str], source: Mapping[str, Any], duration: float
) -> None:
    """Note in a state's metadata that a video has been read to its end.

    Args:
        metadata: of the new state, "frames" being counted already; changed in place.
        before: of the state that was continued.
        source: from `source_facts`.
        duration: seconds the whole video lasts.
    """
    start, end = source["start"] or 0.0, duration if source["end"] is None else min(source["end"], duration)
    frames, seconds = int(metadata["frames"]) - int(before.get("frames", 0)), round(end - start, 6)
    earlier = json.loads(before.get("sources", "[]"))
    sources = [*earlier, {**source, "frames": frames, "seconds": seconds}][-_RECORDED_SOURCES:]
    metadata["sources"] = json.dumps(sources, ensure_ascii=False)
    metadata["video"] = ", ".join(item["name"] for item in sources)
    metadata["fps"] = str(source["fps"])
    metadata["seconds"] = str(round(float(before.get("seconds", 0)) + seconds, 6))
    metadata.pop("chat", None)  # said before these frames were seen


def model_facts(config: Any) -> str:
    """The fields of a `VideoMa2mbaConfig` that decide what a state means, as JSON.

    Listed one by one: whatever else a transformers version adds to `config.json` does not make another model of it.
    """
    facts = {name: getattr(config, name) for name in _MODEL_FIELDS}
    facts |= {f"text_config.{name}": getattr(config.text_config, name) for name in _TEXT_FIELDS}
    vision = config.vision_config
    facts |= {f"vision_config.{name}": getattr(vision, name) for name in tower_adapter(vision).identity_fields}
    return json.dumps(facts)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of the names and sizes of all parameters and of 1024 to 2047 values of each (or all), evenly spread.

    Values are compared as bf16, so that loading a checkpoint in fp32 or bf16 gives the same digest. Empty where
    weights are offloaded and cannot be looked at.
    """
    digest = hashlib.sha256()
    for name, parameter in (*model.named_parameters(), *quantised_weights(model)):
        if parameter.is_meta:
            return ""
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // _SAMPLES)]
        digest.update(values.to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def vocabulary_digest(tokenizer: Any) -> str:
    """Of all tokens and their ids, and of the token that ends a text."""
    return _short_digest(json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token]))


def processor_facts(processor: Processor, vocabulary: str) -> str:
    """What a `VideoMa2mbaProcessor` does to frames and text, as JSON; its sampling defaults are facts of a reading."""
    facts = {
        "size": dict(processor.video_processor.size),
        "resize_mode": processor.video_processor.resize_mode,
        **{k: getattr(processor, k) for k in ("tokens_per_frame", "video_token", "system_prompt", "frame_separator")},
        "chat_template": _short_digest(processor.chat_template),
        "vocabulary": vocabulary,
    }
    if processor.frame_times != "none":  # states of before there were any stay valid
        facts |= {name: getattr(processor, name) for name in ("frame_times", "frame_times_every")}
    return json.dumps(facts)


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def refuse_other(metadata: Mapping[str, str], identity: Mapping[str, str]) -> None:
    """ValueError naming what differs, unless the state of `metadata` was made by the model and processor of
    `identity`. What a state does not say about its origin is not compared.

    Args:
        metadata: of a `VideoState`.
        identity: "model_config" and "processor" (JSON), "weights", "model" and "revision" (for the message).
    """
    made_by = _named(metadata)
    for key, what in (("model_config", "model"), ("processor", "processor")):
        if key not in metadata or metadata[key] == identity[key]:
            continue
        there, here = _parsed(metadata[key]), json.loads(identity[key])
        names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
        if names:
            name = names[0]
            more = f" (and {len(names) - 1} more differ)" if len(names) > 1 else ""
            raise ValueError(
                f"the state belongs to another {what}: {name} is {there.get(name)} there and {here.get(name)} here"
                f"{more}; use {made_by}, which read it, or read the video again"
            )
    read_with, own = metadata.get("weights"), identity.get("weights")
    if read_with and own and read_with != own:
        raise ValueError(
            f"the state belongs to another model: its weights have the digest {read_with[:12]}, those of "
            f"{_named(identity)} have {own[:12]}; use {made_by}, which read it, or read the video again"
        )


def _named(metadata: Mapping[str, str]) -> str:
    revision = metadata.get("revision")
    return f"the model {metadata.get('model') or 'without a name'!r}" + (f" at {revision[:12]}" if revision else "")


def _parsed(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state's metadata are damaged: {error}") from error
