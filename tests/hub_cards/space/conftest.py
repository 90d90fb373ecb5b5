"""The page of the demo, served on this machine for the tests in this folder."""

import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: tests stay off the network

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "videos"


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The page over the bundled checkpoint: `url`, `readings`, which holds one entry for each video read, and `pace`,
    seconds that each report of a reading takes longer."""
    pytest.importorskip("gradio")
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("uploads"))
    from video_ma2mba.hub_cards.relevance_strip import relevance_strip
    from video_ma2mba.hub_cards.space.web.examples import load_examples
    from video_ma2mba.hub_cards.space.web.layout import build_page, serve
    from video_ma2mba.loading import load_pipeline

    pipe = load_pipeline(device="cpu")
    found, read = SimpleNamespace(readings=[], pace=0.0), pipe.read

    @functools.wraps(read)
    def counted(video, on_frames, **settings):
        def slowly(*seen):
            on_frames(*seen)
            time.sleep(found.pace)

        found.readings.append(video)
        return read(video, on_frames=slowly, **settings)

    pipe.read = counted
    examples = load_examples(EXAMPLES)
    page = build_page(pipe, examples, "Ask a video", "Tested.", relevance_strip)
    serve(page, examples, wait=False, server_name="127.0.0.1")
    found.url = page.local_url
    yield found
    page.close()
