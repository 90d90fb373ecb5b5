"""The card of a folder of rendered videos: counts and chance levels are computed from its questions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from .checkpoint_facts import read_json
from .model_card import CITATION

_CHANCE_VIDEOS = 2000  # in a handful of videos, the most frequent answer is right too often by luck
_SIZES = (("n<1K", 1_000), ("1K<n<10K", 10_000), ("10K<n<100K", 100_000), ("100K<n<1M", 1_000_000))


def dataset_card(folder: Path, *, license: str) -> str:
    """Text of `README.md` for a folder that `video-ma2mba world render` wrote.

    Raises:
        FileNotFoundError: it is not such a folder, or its rendering was interrupted.
        ValueError: its questions are not those of its settings, or a video is missing.
    """
    from ..world import WorldDataset
    from ..world.chance import chance_levels

    settings_file, questions_file = folder / "world.json", folder / "questions.jsonl"
    for file in (settings_file, questions_file):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {file.name}: render it with video-ma2mba world render")
    settings = read_json(settings_file)
    try:
        rows = [json.loads(line) for line in questions_file.read_text(encoding="utf-8").splitlines()]
        asked = [(row["video"], row["question"], row["answer"]) for row in rows]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{questions_file} is damaged: render the folder again") from None
    videos = sorted(path.name for path in folder.glob("*.mp4"))
    if missing := sorted({video for video, _, _ in asked} - set(videos)):
        raise ValueError(f"{folder} lacks the videos {', '.join(missing[:5])}: render it again")
    try:
        data = WorldDataset(
            size=max(len(videos), _CHANCE_VIDEOS), **(settings | {"frames": tuple(settings["frames"])})
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"{settings_file} holds no settings of a rendered world ({error})") from None
    drawn = [(name, question) for index, name in enumerate(videos) for question in data.asked(index)[1]]
    if asked != [(name, question.text, question.answer) for name, question in drawn]:
        raise ValueError(f"{questions_file} holds other questions than {settings_file.name} makes: render again")

    chance = chance_levels(question for index in range(len(data)) for question in data.asked(index)[1])
    counts = Counter(question.kind for _, question in drawn) | {"all": len(drawn)}
    example = {question.kind: question for _, question in reversed(drawn)}
    table = [
        f"| {kind} | {counts[kind]:,} | {100 * level:.1f} % | "
        + (f"{example[kind].text} → {example[kind].answer} |" if kind in example else "|")
        for kind, level in chance.items()
    ]
    frames = sum(data.length(index) for index in range(len(videos)))
    low, high = settings["frames"]
    command = (
        f"video-ma2mba world render --out world --count {len(videos)} --kinds {','.join(settings['kinds'])} "
        f"--frames {low}..{high} --seed {settings['seed']} --size {settings['resolution']} --fps {settings['fps']} "
        f"--split {settings['split']}"
    )
    # The verb asks one question per kind, in both forms; a folder made in Python may differ.
    as_the_verb = settings["questions"] == len(settings["kinds"]) and len(settings["forms"]) == 2
    made_by = f"Made by\n\n```bash\n{command}\n```" if as_the_verb else "Made by `render_to_folder` (`world.json`)."
    blocks = [
        f"---\n{_metadata(license, settings['split'], len(drawn))}\n---",
        "# A small rendered world: videos, questions and answers",
        "Coloured shapes that come, rest or move, and go; a card with a sign that hides the scene for one second; a "
        "sun that crosses the sky once. Everything is drawn from a seed, so every answer is known to be right. No "
        "person, place or work of anybody is shown.",
        f"## What is in it\n\n{len(videos):,} videos of {low} to {high} frames ({frames:,} in all) at "
        f"{settings['fps']} frames a second, {settings['resolution']}×{settings['resolution']} pixels, "
        f"{settings['split']} split. `questions.jsonl` holds one object a line: `video`, `kind`, `question`, "
        "`options` (empty for open questions), `answer`, `frames`.",
        "| kind | questions | chance | example |\n| --- | --- | --- | --- |\n" + "\n".join(table),
        f"*Chance* is what somebody scores who never saw a video, on {len(data):,} videos of these settings: per kind "
        "and form, the better of guessing uniformly among the answers that the wording leaves open and always giving "
        "the most frequent answer.",
        made_by,
        "## Limits\n\nA model that does well here has shown that it sees shapes and remembers them, not that it "
        "understands films. Questions come in a few fixed wordings, in English.",
        "## Citation\n\nMade for an independent implementation of the method described in:\n\n" + CITATION,
    ]
    return "\n\n".join(blocks)


def _metadata(license: str, split: str, questions: int) -> str:
    from huggingface_hub import DatasetCardData

    return (
        DatasetCardData(
            license=license,
            language="en",
            pretty_name="A small rendered world",
            task_categories=["video-text-to-text"],
            size_categories=[next((name for name, limit in _SIZES if questions < limit), "n>1M")],
            tags=["video-ma2mba", "synthetic", "video-question-answering"],
            configs=[{"config_name": "default", "data_files": [{"split": split, "path": "questions.jsonl"}]}],
        )
        .to_yaml()
        .strip()
    )
