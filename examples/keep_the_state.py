"""Read a video today, ask about it tomorrow: the state is one small file, whatever the video's length.

python examples/keep_the_state.py [VIDEO] [STATE_FILE]
"""

import sys
import tempfile
from pathlib import Path

from video_ma2mba import VideoState
from video_ma2mba.loading import load_pipeline

video = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "videos" / "000000.mp4")
file = Path(sys.argv[2] if len(sys.argv) > 2 else Path(tempfile.mkdtemp()) / "video.safetensors")

pipe = load_pipeline()  # the bundled checkpoint; a directory or Hub id works too
state = pipe.read(video, fps=1)
state.save(file)
print(f"{file}: {file.stat().st_size / 1e6:.2f} MB after {state.metadata['frames']} frames")

again = VideoState.load(file)  # in another process, on another machine
print(pipe.ask(again, "Which sign did the card show?"))
print(
    pipe.ask(again, "How many squares are there?")
)  # each question forks the state: the file's content stays as it is
