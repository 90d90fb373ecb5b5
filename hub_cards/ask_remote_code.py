"""Asks a checkpoint folder a question by the code that it carries, without this package, as any user of the Hub does.

Run by `preflight.py` as a script, in an interpreter of its own: `ask_remote_code.py FOLDER VIDEO QUESTION [BASE]`.
With BASE, FOLDER is a LoRA adapter of it. Prints one JSON object with the answer.
"""

import json
import sys

sys.modules["video_ma2mba"] = None  # importing the package fails from here on, however it is installed

from transformers import pipeline  # noqa: E402 (the package must be hidden before)


def main(folder: str, video: str, question: str, base: str | None = None) -> None:
    """Load `folder`, ask, and print one JSON object: "answer" and the number of "frames" read.

    Raises:
        AssertionError: the model's class comes from elsewhere than the folder.
    """
    pipe = pipeline("video-question-answering", model=base or folder, device="cpu", trust_remote_code=True)
    if base is not None:
        from peft import PeftModel

        pipe.model = PeftModel.from_pretrained(pipe.model, folder).merge_and_unload()
    module = type(pipe.model).__module__
    assert module.startswith("transformers_modules."), f"{module} is not the checkpoint's own code"
    state = pipe.read(video)
    print(json.dumps({"answer": pipe.ask(state, question, max_new_tokens=8), "frames": state.metadata.get("frames")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
