"""The model card of a VideoMamba that finds videos by texts: its configuration, what was measured, how to use it."""

from __future__ import annotations

from typing import Any

from .model_card import count_in_words
from .videomamba_card import CITATION


def retrieval_card(
    config: Any,
    parameters: int,
    *,
    title: str,
    license: str | None = None,
    source: str | None = None,
    accuracy: str | None = None,
    recipe: str | None = None,
) -> str:
    """Text of `README.md`.

    Args:
        config: `VideoMambaRetrievalConfig` of the model. parameters: how many it has.
        license: identifier such as apache-2.0; None says nothing. source: where the weights came from.
        accuracy: Markdown of what was measured; None says that nothing was. recipe: Markdown of how it was trained.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["video-ma2mba", "videomamba", "mamba", "video-text-retrieval"],
    )
    vision, text = config.vision_config, config.text_config
    rows = [
        ("parameters", f"{count_in_words(parameters)} ({parameters:,})"),
        ("clips", f"VideoMamba, {vision.num_hidden_layers} blocks × {vision.hidden_size}; {vision.num_frames} frames "
                  f"of {vision.image_size}×{vision.image_size} pixels"),
        ("texts", f"BERT, {text.num_hidden_layers} layers × {text.hidden_size}, the last {config.fusion_layers} with "
                  f"cross-attention to the clip; {config.max_text_length} tokens"),
        ("space", f"{config.projection_dim} dimensions"),
    ]  # fmt: skip
    if source is not None:
        rows.append(("converted from", f"`{source}`"))
    use = [
        "```bash",
        'video-ma2mba retrieve "TEXT" --videos DIR --model PATH_OR_ID',
        "```",
        "",
        "```python",
        "from transformers import AutoModel",
        "",
        'model = AutoModel.from_pretrained("PATH_OR_ID", trust_remote_code=True)',
        "```",
        "",
        "`model.encode_clips`, `model.encode_texts` and `model.match` are what the command uses. "
        "`trust_remote_code=True` runs the code in this folder: read it before, or install `video-ma2mba`, where it "
        "is not needed.",
    ]
    blocks = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {title}",
        "Finds videos by texts and texts by videos: a VideoMamba beside a BERT, and layers that compare a pair "
        "closely. In the format of `video-ma2mba`, an independent implementation of [VideoMamba](https://arxiv.org/abs/2403.06977).",
        "## At a glance\n\n| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows),
        "## Use\n\n" + "\n".join(use),
    ]
    if recipe:
        blocks.append(f"## Training\n\n{recipe}")
    if accuracy:
        blocks.append(f"## Recall\n\n{accuracy}")
    limits = [
        "- Nothing beyond what the tables say was measured here."
        if accuracy
        else "- No recall was measured for this card.",
        f"- It sees {vision.num_frames} frames of a video, spread over it, and hears nothing.",
        "- What it finds first can be wrong. Do not let it decide anything about people.",
    ]
    return "\n\n".join([*blocks, "## Limits\n\n" + "\n".join(limits), "## Citation\n\n" + CITATION])
