"""What the page says about its model: the author's own words on the model's card."""

from __future__ import annotations

import re
from pathlib import Path

HOW = "A video is read once, into a state of constant size, and every question is answered from that state."


def about_model(checkpoint: Path) -> str:
    """How the page works, and the first paragraph between the marks for own words of `README.md`, where there is one.

    Args:
        checkpoint: folder of the model; a Hub id, which is none, has no words here.
    """
    card = checkpoint / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(r"<!-- own words -->\s*(.*?)\s*(?:\n\n|<!-- end of own words -->)", text, re.S)
    return f"{HOW}\n\n**This model.** {found[1]}\n\n" if found and found[1] else f"{HOW}\n\n"
