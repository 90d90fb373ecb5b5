"""Ask one video several questions through the transformers pipeline.

python examples/ask_with_the_pipeline.py [VIDEO] [QUESTION ...]
"""

import sys
from pathlib import Path

from transformers import pipeline

import video_ma2mba

video = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "videos" / "000000.mp4")
questions = sys.argv[2:] or ["Which sign did the card show?", "How many squares are there?"]

pipe = pipeline("video-question-answering", model=str(video_ma2mba.BUNDLED_CHECKPOINT), trust_remote_code=True)
print(pipe(video=video, question=questions[0]))  # one call, in the shape that transformers' pipelines answer in

state = pipe.read(video, fps=1)  # or read once ...
print(f"{state.metadata['frames']} frames in a state of {state.nbytes / 1e6:.2f} MB")
for question in questions:  # ... and ask as often as you like
    print(question, "->", pipe.ask(state, question))
