"""The card of a VideoMamba says what its configuration says, and accuracy only where it was measured."""

import re

import pytest
from huggingface_hub import ModelCard

from video_ma2mba.hub_cards.videomamba_card import videomamba_card
from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig


@pytest.mark.parametrize(
    ("tubelet", "classifier", "task"),
    [
        (1, True, "video-classification"),
        (1, False, "video-feature-extraction"),
        (None, True, "image-classification"),
        (None, False, "image-feature-extraction"),
    ],
)
def test_the_card_says_what_the_configuration_says(tubelet, classifier, task):
    config = VideoMambaConfig.preset("s", num_labels=400, num_frames=16, tubelet_size=tubelet)
    text = videomamba_card(config, 25_568_656, classifier=classifier, title="mine", source="file.pth")
    card = ModelCard(text)
    assert (card.data.pipeline_tag, card.data.library_name, card.data.license) == (task, "transformers", None)
    assert "25.57M (25,568,656)" in text and "24 × 384" in text and "`file.pth`" in text
    assert "No accuracy was measured" in text and "## Accuracy" not in text
    assert ("16 frames of 224×224" in text) == (tubelet is not None)
    assert ("400: LABEL_0" in text) == classifier
    assert "| tokens | 3,137," in text if tubelet else "| tokens | 197," in text
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(block, "card", "exec")


def test_measurements_licence_and_recipe_are_shown():
    config = VideoMambaConfig(num_labels=2, id2label={0: "left", 1: "right"})
    text = videomamba_card(
        config, 7, classifier=True, title="t", license="mit", accuracy="| a | 90% |", recipe="python x"
    )
    assert ModelCard(text).data.license == "mit"
    assert "## Accuracy\n\n| a | 90% |" in text and "## Training\n\npython x" in text and "2: left, right" in text
    assert "No accuracy" not in text
