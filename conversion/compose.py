"""Compose a fresh Video-Ma2mba model from a Mamba-2 language model and a vision tower."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..modeling_video_ma2mba.configuration_video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig
from ..modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from ..modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from ..modeling_video_ma2mba.state_writing import give_usual_permissions
from ..modeling_video_ma2mba.vision_towers import TOWERS
from .layouts import OURS, detect_layout, unused
from .presets import PRESETS, check_parts
from .tensor_store import TensorStore

# Width and layers of state-spaces/mamba2-*, the language models of the paper's three sizes (0.7B, 1.8B, 3.1B).
# The state-spaces checkpoints come without tokenizer files; this is what they were trained with.
STATE_SPACES_TOKENIZER = "EleutherAI/gpt-neox-20b"
_FRESH = "videomamba-"


def compose(
    language_model: str | None,
    vision_tower: str | None,
    preset: str | None,
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
    config_only: bool = False,
    seed: int = 0,
    tokenizer: str | None = None,
) -> Path:
    """Write a model to train (weights, processor, code) to a directory. What no checkpoint is named for is random.

    Args:
        language_model: directory or Hub id of a Mamba-2 checkpoint, in the layout of transformers'
            `Mamba2ForCausalLM` or of state-spaces (`config.json` with `d_model`, `pytorch_model.bin`).
        vision_tower: directory or Hub id of a CLIP or SigLIP model (whole or vision part), or of a VideoMamba
            encoder or classifier; "videomamba-ti", "-s", "-m" or "-b" is a fresh one of that size.
        preset: "370m", "1.3b" or "2.7b": the paper's sizes with CLIP ViT-L/14 at 336 pixels, without any download.
        out: directory to write.
        dtype: of the weights; the SSM's A, D and step biases stay fp32.
        config_only: write `config.json` alone.
        seed: of everything random.
        tokenizer: directory or Hub id. Default: the language model's, for state-spaces checkpoints GPT-NeoX's; a
            preset without language model gets the byte-level tokenizer.

    Returns:
        `out`.

    Raises:
        ValueError: nothing to compose, an unknown preset, not a Mamba-2 language model, not a CLIP or SigLIP tower, or
            a checkpoint with missing or mismatched tensors.
        OSError: a checkpoint that does not exist or cannot be fetched.
    """
    check_parts(language_model, vision_tower, preset)
    out = Path(out)

    text_config, tensors = _preset_text_config(preset), {}
    folder = None
    if language_model is not None:
        folder = local_folder(language_model, weights=not config_only)
        text_config = text_config_from(folder, language_model)
        if not config_only:
            tensors = language_tensors(folder, text_config, language_model)
    vision_config, statistics = vision_parts(vision_tower)

    if config_only:
        config = _config(text_config, vision_config, statistics, min(50277, text_config.vocab_size - 1))
        out.mkdir(parents=True, exist_ok=True)
        config.architectures = [VideoMa2mbaForConditionalGeneration.__name__]
        config.to_json_file(out / "config.json")
        return out

    tokenizer_with_video, video_token_id = text_tokenizer(tokenizer, folder, text_config, tensors)
    config = _config(text_config, vision_config, statistics, video_token_id)
    config.pad_token_id = config.text_config.pad_token_id = tokenizer_with_video.pad_token_id
    if vision_tower is not None and not fresh_tower(vision_tower):
        tensors |= _tower_tensors(vision_tower, config)
    model = _build(config, tensors, dtype, seed)
    model.save_pretrained(out)
    give_usual_permissions(out)
    build_processor(config, tokenizer_with_video).save_pretrained(out)
    return out


def local_folder(source: str, weights: bool = True) -> Path:
    """Directory of a checkpoint: `source` itself, or what is fetched from the Hub (safetensors before pickles).

    Raises:
        FileNotFoundError: neither a directory nor a Hub id. OSError: it cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{source} holds no config.json: it is not a checkpoint")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise FileNotFoundError(f"there is no directory {source} (and it is no Hub id such as owner/name)")
    from huggingface_hub import snapshot_download

    text = ["*.json", "*.txt", "tokenizer*"]
    try:
        patterns = [*text, *(["*.safetensors"] if weights else [])]
        fetched = Path(snapshot_download(source, allow_patterns=patterns))
        if weights and not list(fetched.glob("*.safetensors")):
            fetched = Path(snapshot_download(source, allow_patterns=[*text, "*.bin"]))
    except (OSError, ValueError) as error:
        raise OSError(
            f"{source} cannot be fetched from the Hub: check the name and the network, and log in with `hf auth "
            f"login` if access must be granted ({str(error).strip().splitlines()[0]})"
        ) from error
    if not (fetched / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json: it is not a checkpoint")
    return fetched


def text_config_from(folder: Path, name: str) -> Ma2mbaTextConfig:
    """Language model configuration of a checkpoint in either layout.

    Raises:
        ValueError: not a pure Mamba-2 model.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config.json of {name} is damaged: {error}") from error
    if fields.get("model_type") in ("mamba2", "video_ma2mba_text"):
        return VideoMa2mbaConfig(text_config=fields, video_token_id=0).text_config
    if "d_model" not in fields or "n_layer" not in fields:
        raise ValueError(
            f"{name} is no Mamba-2 checkpoint: its config.json has model_type {fields.get('model_type')!r} and lacks "
            "the fields of a state-spaces model"
        )
    ssm = fields.get("ssm_cfg") or {}
    if ssm.get("layer") != "Mamba2":
        raise ValueError(f"{name} is built of {ssm.get('layer', 'Mamba1')} layers, not of Mamba2")
    if fields.get("attn_layer_idx") or fields.get("d_intermediate"):
        raise ValueError(f"{name} has attention or MLP layers: only pure Mamba-2 models are supported")
    multiple = fields.get("pad_vocab_size_multiple", 1)
    return Ma2mbaTextConfig(
        vocab_size=-(-fields.get("vocab_size", 50277) // multiple) * multiple,
        hidden_size=fields["d_model"],
        num_hidden_layers=fields["n_layer"],
        state_size=ssm.get("d_state", 128),
        head_dim=ssm.get("headdim", 64),
        expand=ssm.get("expand", 2),
        n_groups=ssm.get("ngroups", 1),
        conv_kernel=ssm.get("d_conv", 4),
        chunk_size=ssm.get("chunk_size", 256),
        residual_in_fp32=fields.get("residual_in_fp32", True),
        tie_word_embeddings=fields.get("tie_embeddings", True),
    )


def language_tensors(folder: Path, config: Ma2mbaTextConfig, name: str) -> dict[str, Tensor]:
    """Weights of a Mamba-2 checkpoint under the names of `VideoMa2mbaForConditionalGeneration`.

    The embedding's rows count, whatever the configuration says: checkpoints pad their vocabulary.

    Raises:
        ValueError: tensors are missing, of another shape, or not expected.
    """
    renamed = part_tensors(folder, name)
    embedding = renamed.get(f"{OURS.language}embeddings.weight")
    if embedding is None:
        raise ValueError(f"{name} has no embedding weights: it is not a whole language model")
    config.vocab_size = embedding.shape[0]
    if config.tie_word_embeddings:
        renamed.pop("lm_head.weight", None)

    with torch.device("meta"):
        whole = VideoMa2mbaForConditionalGeneration(
            VideoMa2mbaConfig(config, video_token_id=0, tie_word_embeddings=config.tie_word_embeddings)
        )
    wanted = {k: v.shape for k, v in whole.state_dict().items() if k.startswith((OURS.language, "lm_head."))}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    missing, extra = sorted(wanted.keys() - renamed.keys()), sorted(renamed.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(f"{name} does not fit its configuration: missing tensors {missing[:5]}, unknown {extra[:5]}")
    _check_shapes(renamed, wanted, name)
    return renamed


def part_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint that holds one part of the model, by canonical name (see `layouts`); unknown ones by
    their own."""
    store = TensorStore(folder, name)
    with closing(store):
        for adapter in TOWERS.values():
            if (names := adapter.names_within(store.specs)) is not None:
                return {f"{OURS.tower}{own}": store.read(key) for key, own in names.items()}
        layout = detect_layout(store.specs, name)
        return {layout.canonical(key) or key: store.read(key) for key in store.specs if not unused(key)}


def _check_shapes(tensors: dict[str, Tensor], wanted: Mapping[str, torch.Size], name: str) -> None:
    for key, shape in wanted.items():
        if tensors[key].shape != shape:
            found = tuple(tensors[key].shape)
            raise ValueError(f"{name}: tensor {key} has the shape {found}, its configuration says {tuple(shape)}")


def _preset_text_config(preset: str | None) -> Ma2mbaTextConfig | None:
    if preset is None:
        return None
    width, layers = PRESETS[preset]
    return Ma2mbaTextConfig(hidden_size=width, num_hidden_layers=layers)


def vision_parts(source: str | None) -> tuple[Any, dict[str, list[float]]]:
    """Vision configuration (None: CLIP ViT-L/14-336) and, where the checkpoint states them, mean and deviation."""
    if source is None:
        return None, {}
    if fresh_tower(source):
        return VideoMambaConfig.preset(source.removeprefix(_FRESH)), {}
    folder = local_folder(source, weights=False)
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if config.model_type not in TOWERS:
        raise ValueError(
            f"{source} is no CLIP or SigLIP model, nor another of the vision towers {', '.join(TOWERS)}: its vision "
            f"part has model_type {config.model_type!r}"
        )
    return config, pixel_statistics(folder)


def fresh_tower(source: str | None) -> bool:
    """Whether a tower's name means random weights of a VideoMamba size ("videomamba-m"), not a checkpoint."""
    return source is not None and source.startswith(_FRESH) and not Path(source).exists()


def pixel_statistics(folder: Path) -> dict[str, list[float]]:
    """`image_mean` and `image_std` of a checkpoint's image processor; empty where it has none."""
    with contextlib.suppress(FileNotFoundError):
        fields = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        return {key: fields[key] for key in ("image_mean", "image_std") if key in fields}
    return {}


def _tower_tensors(source: str, config: VideoMa2mbaConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        tower = TOWERS[config.vision_config.model_type].make_tower(config.vision_config)
    wanted = {f"{OURS.tower}{key}": tensor.shape for key, tensor in tower.state_dict().items()}
    tensors = part_tensors(local_folder(source), source)
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"{source} lacks tensors of a vision tower: {missing[:5]}")
    _check_shapes(tensors, wanted, source)
    return {key: tensors[key] for key in wanted}


def _config(
    text_config: Ma2mbaTextConfig, vision_config: Any, statistics: dict[str, list[float]], video_token_id: int
) -> VideoMa2mbaConfig:
    kind = "clip_vision_model" if vision_config is None else vision_config.model_type
    return VideoMa2mbaConfig(
        text_config,
        vision_config,
        video_token_id=video_token_id,
        vision_feature_layer=TOWERS[kind].feature_layer,
        tie_word_embeddings=text_config.tie_word_embeddings,
        **statistics,
    )


def text_tokenizer(
    source: str | None, folder: Path | None, text_config: Ma2mbaTextConfig, tensors: dict[str, Tensor]
) -> tuple[PreTrainedTokenizerBase, int]:
    """Tokenizer with a token for videos and one for padding; grows the embedding where they do not fit."""
    from video_ma2mba.processing.byte_tokenizer import VIDEO_TOKEN, add_video_tokens, build_byte_tokenizer

    if source is None and folder is None:
        tokenizer = build_byte_tokenizer()
        return tokenizer, tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    if source is None:
        has_own = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
        source = str(folder) if has_own else STATE_SPACES_TOKENIZER
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise OSError(
            f"the tokenizer {source} cannot be loaded ({str(error).splitlines()[0]}): name one with tokenizer="
        ) from error
    video_token_id = add_video_tokens(tokenizer)
    if len(tokenizer) > text_config.vocab_size:
        text_config.vocab_size = -(-len(tokenizer) // 16) * 16
        for key in (OURS.language + "embeddings.weight", "lm_head.weight"):
            if key in tensors:
                rows = tensors[key]
                average = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
                tensors[key] = torch.cat([rows, average.expand(text_config.vocab_size - len(rows), -1)])
    return tokenizer, video_token_id


def _build(
    config: VideoMa2mbaConfig, tensors: dict[str, Tensor], dtype: torch.dtype, seed: int
) -> VideoMa2mbaForConditionalGeneration:
    """Model with the given tensors and random others."""
    with torch.random.fork_rng(devices=[]), without_loading_warnings():
        torch.manual_seed(seed)
        model = VideoMa2mbaForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype
        )
    model.generation_config.pad_token_id = config.pad_token_id
    return model


def build_processor(config: VideoMa2mbaConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The processor of a model: frames at its size, text through `tokenizer`."""
    from video_ma2mba.processing.processing_video_ma2mba import VideoMa2mbaProcessor
    from video_ma2mba.processing.video_processing_video_ma2mba import VideoMa2mbaVideoProcessor

    side = config.vision_config.image_size
    video_processor = VideoMa2mbaVideoProcessor(size={"height": side, "width": side})
    return VideoMa2mbaProcessor(tokenizer, video_processor, tokens_per_frame=config.tokens_per_frame)


@contextlib.contextmanager
def without_loading_warnings() -> Iterator[None]:
    """Keep transformers from warning of the tensors that are meant to be new."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
