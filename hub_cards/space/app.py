"""Starts the page on a Space: the model is the folder `checkpoint` beside this file, run by its own code.

With the variable MODEL_ID (and MODEL_REVISION) set for the Space, that model of the Hub is taken instead.
"""

import os
from pathlib import Path

from transformers import pipeline
from web.examples import load_examples
from web.layout import about_model, build_page, serve

HERE = Path(__file__).parent
ABOUT = "Uploads stay on this machine for an hour at most."


def main() -> None:
    """Load the model and serve the page."""
    model = os.environ.get("MODEL_ID") or str(HERE / "checkpoint")
    revision = os.environ.get("MODEL_REVISION")
    pipe = pipeline("video-question-answering", model=model, revision=revision, trust_remote_code=True)
    examples = load_examples(HERE / "examples")
    serve(
        build_page(pipe, examples, "Ask a video", f"{about_model(Path(model))} {ABOUT}"),
        examples,
        max_file_size="500mb",
    )


if __name__ == "__main__":
    main()
