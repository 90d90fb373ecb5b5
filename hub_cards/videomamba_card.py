"""The model card of a VideoMamba encoder or classifier: its configuration, what was measured, how to use it."""

from __future__ import annotations

from typing import Any

from .model_card import count_in_words

CITATION = """\
```bibtex
@article{li2024videomamba,
  title   = {VideoMamba: State Space Model for Efficient Video Understanding},
  author  = {Li, Kunchang and Li, Xinhao and Wang, Yi and He, Yinan and Wang, Yali and Wang, Limin and Qiao, Yu},
  journal = {arXiv preprint arXiv:2403.06977},
  year    = {2024}
}
```
"""
_NAMED = 12  # classes that the card lists


def videomamba_card(
    config: Any,
    parameters: int,
    *,
    classifier: bool,
    title: str,
    license: str | None = None,
    source: str | None = None,
    accuracy: str | None = None,
    recipe: str | None = None,
) -> str:
    """Text of `README.md`.

    Args:
        config: `VideoMambaConfig` of the model. parameters: how many it has.
        classifier: whether it has a head.
        license: identifier such as apache-2.0; None says nothing.
        source: where the weights came from, a file or Hub id.
        accuracy: Markdown of what was measured; None says that nothing was.
        recipe: Markdown of how it was trained.
    """
    from huggingface_hub import ModelCardData

    task = "video-classification" if config.is_video else "image-classification"
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=task
        if classifier
        else ("video-feature-extraction" if config.is_video else "image-feature-extraction"),
        tags=["video-ma2mba", "videomamba", "mamba"],
    )
    kind = "classifier" if classifier else "encoder"
    what = "clips" if config.is_video else "pictures"
    blocks = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {title}",
        f"A VideoMamba {kind} of {what}: no attention, so cost grows linearly with the number of frames. In the "
        "format of `video-ma2mba`, an independent implementation of [VideoMamba](https://arxiv.org/abs/2403.06977).",
        "## At a glance\n\n" + _glance(config, parameters, classifier, source),
        "## Use\n\n" + (_use_classifier(config, task) if classifier else _use_encoder(config)),
    ]
    if recipe:
        blocks.append(f"## Training\n\n{recipe}")
    if accuracy:
        blocks.append(f"## Accuracy\n\n{accuracy}")
    blocks += ["## Limits\n\n" + _limits(config, bool(accuracy)), "## Citation\n\n" + CITATION]
    return "\n\n".join(blocks)


def _glance(config: Any, parameters: int, classifier: bool, source: str | None) -> str:
    side = config.image_size
    rows = [
        ("parameters", f"{count_in_words(parameters)} ({parameters:,})"),
        ("blocks", f"{config.num_hidden_layers} × {config.hidden_size}, state {config.state_size} a channel"),
        ("scan order", f"`{config.scan_order}`"),
    ]
    if config.is_video:
        rows.append(("clip", f"{config.num_frames} frames of {side}×{side} pixels, tubelets of {config.tubelet_size}"))
    else:
        rows.append(("picture", f"{side}×{side} pixels"))
    rows.append(("tokens", f"{1 + config.grid[0] * config.grid[1]:,}, patches of {config.patch_size} pixels"))
    if classifier:
        names = [str(config.id2label[number]) for number in range(config.num_labels)]
        listed = ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
        rows.append(("classes", f"{config.num_labels}: {listed}"))
    if source is not None:
        rows.append(("converted from", f"`{source}`"))
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _use_classifier(config: Any, task: str) -> str:
    read = "video.mp4" if config.is_video else "picture.jpg"
    lines = [
        "```bash",
        'pip install torch "transformers>=5.23" accelerate av pillow',  # 5.10's pipeline wants an image processor
        "```",
        "",
        "```python",
    ]
    if config.is_video:
        lines += [
            "from transformers import pipeline",
            "",
            f'pipe = pipeline("{task}", model="PATH_OR_ID", trust_remote_code=True)',
            f'print(pipe("{read}"))',
        ]
    else:
        lines += [
            "from transformers import AutoModelForImageClassification",
            "from transformers.models.auto.video_processing_auto import AutoVideoProcessor  # needs no torchvision so",
            "",
            'model = AutoModelForImageClassification.from_pretrained("PATH_OR_ID", trust_remote_code=True)',
            'processor = AutoVideoProcessor.from_pretrained("PATH_OR_ID", trust_remote_code=True)',
            f'print(model(**processor("{read}", return_tensors="pt")).logits)',
        ]
    lines += [
        "```",
        "",
        "`trust_remote_code=True` runs the code in this folder: read it before. Where `video-ma2mba` is installed, "
        "this does the same without running code from here:",
        "",
        "```bash",
        f"video-ma2mba classify {read} --model PATH_OR_ID",
        "```",
    ]
    return "\n".join(lines)


def _use_encoder(config: Any) -> str:
    shape = f"1, {config.num_frames}, 3, {config.image_size}, {config.image_size}"
    return "\n".join(
        [
            "```python",
            "import torch",
            "from transformers import AutoModel",
            "",
            'model = AutoModel.from_pretrained("PATH_OR_ID", trust_remote_code=True)',
            f"clip = torch.zeros({shape}, dtype=torch.uint8)  # raw RGB; floating point is taken as normalised",
            "print(model(clip).last_hidden_state.shape)  # the class token first",
            "```",
            "",
            "`trust_remote_code=True` runs the code in this folder: read it before. As vision tower of a "
            "Video-Ma2mba: `video-ma2mba init --vision-tower PATH_OR_ID`.",
        ]
    )


def _limits(config: Any, measured: bool) -> str:
    lines = [
        "- Nothing beyond what the tables say was measured here."
        if measured
        else "- No accuracy was measured for this card.",
    ]
    if config.is_video:
        lines.append(
            f"- It sees {config.num_frames} frames of a video, spread over it; what happens between them is not seen."
        )
    lines += [
        "- Sound is not read.",
        "- Classes can be wrong and their scores sure. Do not let them decide anything about people.",
    ]
    return "\n".join(lines)
