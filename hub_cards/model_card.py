"""The model card: what the checkpoint's files and a measured table say, and the author's own words; nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint_facts import CheckpointFacts
from .evaluations import Evaluation

OWN_WORDS_BEGIN, OWN_WORDS_END = "<!-- own words -->", "<!-- end of own words -->"
_OWN_WORDS = re.compile(re.escape(OWN_WORDS_BEGIN) + r"\n(.*?)\n" + re.escape(OWN_WORDS_END), re.S)
_TAGS = ("video-ma2mba", "mamba2", "video-question-answering")
_PLAIN_METADATA = (str, int, float, bool, list)  # of an earlier card: whatever is not ours to compute stays
_OURS = {"license", "library_name", "pipeline_tag", "base_model", "base_model_relation", "model-index", "tags"}

CITATION = """\
```bibtex
@article{lee2024videoma2mba,
  title   = {Look Every Frame All at Once: Video-Ma2mba for Efficient Long-form Video Understanding
             with Multi-Axis Gradient Checkpointing},
  author  = {Lee, Hosu and Kim, Junho and Kim, Hyunjun and Ro, Yong Man},
  journal = {arXiv preprint arXiv:2411.19460},
  year    = {2024}
}
```
"""


def read_metadata(card: Path) -> dict[str, Any]:
    """Metadata of a card; empty where there is no card or no metadata."""
    from huggingface_hub.repocard import metadata_load

    return (metadata_load(card) or {}) if card.is_file() else {}


def own_words(card: Path) -> tuple[str | None, str | None]:
    """Title and text that an author put between the marks `OWN_WORDS_BEGIN` and `OWN_WORDS_END`; None where none."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = _OWN_WORDS.search(text)
    if found is None:
        return None, None
    title = re.search(r"^# (.+)$", text[: found.start()], re.M)
    return (title[1] if title else None), found[1]


def model_card(
    facts: CheckpointFacts,
    repo_id: str,
    *,
    license: str,
    revision: str | None = None,
    base_model: str | None = None,
    metadata: dict[str, Any] | None = None,
    title: str | None = None,
    words: str | None = None,
    evaluations: Sequence[Evaluation] = (),
    cost: str | None = None,
) -> str:
    """Text of `README.md`.

    Args:
        revision: tag or commit that the lines to copy pin; None pins nothing.
        base_model: Hub id of the model that this one was made from, if known; an adapter needs it.
        metadata: of an earlier card; entries that are not computed here (language, data sets …) are kept.
        title, words: the author's own; see `own_words`.
        evaluations: what was measured, of `read_evaluation`.
        cost: Markdown of `measured_cost`.

    Raises:
        ValueError: an adapter without `base_model`.
    """
    if facts.adapter is not None and base_model is None:
        raise ValueError("an adapter's card must name the model it belongs to: give --base-model owner/name")
    header = _metadata(facts, repo_id, license, base_model, metadata or {}, evaluations)
    blocks = [
        f"---\n{header}\n---",
        f"# {title or repo_id.split('/')[-1]}",
        f"{OWN_WORDS_BEGIN}\n{words or ''}\n{OWN_WORDS_END}",
        "Answers questions about videos of any length, in memory that does not grow with the video: frames become "
        "tokens, and a Mamba-2 language model folds them into a state of constant size. Made with `video-ma2mba`, "
        "an independent implementation of the method of [Video-Ma2mba](https://arxiv.org/abs/2411.19460).",
        "## At a glance\n\n" + _glance(facts, base_model),
        "## Use\n\n"
        + (_use_model(repo_id, revision) if facts.adapter is None else _use_adapter(repo_id, base_model, revision)),
    ]
    if cost:
        blocks.append(f"## Memory and speed\n\n{cost}")
    if evaluations:
        blocks.append("## Evaluation\n\n" + "\n\n".join(found.markdown for found in evaluations))
    blocks += [
        "## Limits\n\n" + _limits(bool(evaluations)),
        "## Citation\n\nThe method is described in:\n\n" + CITATION,
    ]
    return "\n\n".join(blocks)


def _metadata(
    facts: CheckpointFacts,
    repo_id: str,
    license: str,
    base_model: str | None,
    earlier: dict[str, Any],
    evaluations: Sequence[Evaluation],
) -> str:
    from huggingface_hub import ModelCardData

    # PEFT's card has a tag with the base model, which may be a path of this machine; base_model says it already
    tags = [tag for tag in earlier.get("tags") or [] if not str(tag).startswith("base_model:")]
    kept = {k: v for k, v in earlier.items() if k not in _OURS and isinstance(v, _PLAIN_METADATA)}
    is_adapter = facts.adapter is not None
    if base_model is not None:
        kept["base_model_relation"] = "adapter" if is_adapter else earlier.get("base_model_relation", "finetune")
    data = ModelCardData(
        license=license,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="video-text-to-text",
        base_model=base_model,
        tags=list(dict.fromkeys([*_TAGS, *(["lora"] if is_adapter else []), *tags])),
        model_name=repo_id.split("/")[-1] if evaluations else None,
        eval_results=[entry for found in evaluations for entry in found.entries] or None,
        **kept,
    )
    return data.to_yaml().strip()


def _glance(facts: CheckpointFacts, base_model: str | None) -> str:
    parts = ", ".join(f"{part} {count_in_words(n)}" for part, n in facts.parameters.items())
    total = sum(facts.parameters.values())
    rows = [("parameters stored", f"{count_in_words(total)} ({parts})")]
    rows.append(("weights", f"{_size(facts.weight_bytes)}, {', '.join(facts.dtypes)}"))
    if base_model is not None:
        rows.append(("made from", f"`{base_model}`"))
    if facts.adapter is not None:
        rows.append(("LoRA", f"rank {facts.adapter.get('r')}, alpha {facts.adapter.get('lora_alpha')}"))
    else:
        text, vision, side = (
            facts.config.text_config,
            facts.config.vision_config,
            facts.config.vision_config.image_size,
        )
        rows += [
            (
                "language model",
                f"Mamba-2, {text.num_hidden_layers} layers × {text.hidden_size}, state {text.state_size}",
            ),
            (
                "vision tower",
                f"{vision.model_type}, {vision.num_hidden_layers} layers × {vision.hidden_size}, "
                f"patches of {vision.patch_size} pixels",
            ),
            ("frames", f"{side}×{side} pixels, {facts.config.tokens_per_frame} tokens each"),
            ("state", f"{_size(facts.state_bytes)}, whatever the length of the video"),
        ]
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _use_model(repo_id: str, revision: str | None) -> str:
    return f"""\
```bash
pip install torch "transformers>=5.10" accelerate av jinja2 pillow
```

```python
from transformers import pipeline

pipe = pipeline("video-question-answering", model="{repo_id}"{_pinned(revision)}, trust_remote_code=True)
state = pipe.read("video.mp4", fps=1)  # the video is read once ...
print(pipe.ask(state, "What is shown?"))  # ... and asked about as often as you like
```

`trust_remote_code=True` runs the code in this repository: read it before. {_pinning(revision)} Where `video-ma2mba` is
installed, this does the same without running code from here:

```bash
video-ma2mba ask video.mp4 "What is shown?" --model {repo_id}
```"""


def _use_adapter(repo_id: str, base_model: str | None, revision: str | None) -> str:
    return f"""\
```bash
pip install torch "transformers>=5.10" accelerate av jinja2 pillow peft
```

```python
from peft import PeftModel
from transformers import pipeline

pipe = pipeline("video-question-answering", model="{base_model}", trust_remote_code=True)
pipe.model = PeftModel.from_pretrained(pipe.model, "{repo_id}"{_pinned(revision)}).merge_and_unload()
print(pipe("video.mp4", "What is shown?"))
```

`trust_remote_code=True` runs the code in the base model's repository: read it, and pin it there with `revision=`, too.
{_pinning(revision)}"""


def _pinned(revision: str | None) -> str:
    return f', revision="{revision}"' if revision else ""


def _pinning(revision: str | None) -> str:
    if revision is None:
        return 'Pin what you have read with `revision="<commit>"`.'
    return (
        f"`{revision}` is a tag on the commit with exactly these files; the commit's own hash pins them more strictly."
    )


def _limits(evaluated: bool) -> str:
    lines = [
        "- A state of constant size forgets: what was shown once, long ago, may be gone.",
        "- Sound is not read.",
        "- Answers can be wrong and sound sure. Do not let them decide anything about people, and do not use the "
        "model to identify or watch them.",
    ]
    if evaluated:
        lines.insert(0, "- Nothing beyond the lengths and the kinds of question in the tables was measured here.")
    else:
        lines.insert(0, "- No accuracy was measured for this card.")
    return "\n".join(lines)


def count_in_words(number: int) -> str:
    """1234567 -> "1.23M"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes / 1e3:.1f} kB"
