"""What the server counts, for Prometheus; of all its processes together."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # of prometheus_client: what several processes count
_FAST = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
REQUESTS = Counter("video_ma2mba_requests", "Requests answered.", ["method", "route", "status"])
SECONDS = Histogram("video_ma2mba_request_seconds", "Seconds of a request.", ["route"], buckets=_FAST)
FIRST_TOKEN = Histogram(
    "video_ma2mba_first_token_seconds", "Seconds from a request to its first token.", buckets=_FAST
)
TOKENS = Counter("video_ma2mba_tokens", "Tokens, of questions and of answers.", ["kind"])
BATCH = Histogram("video_ma2mba_batch_rows", "Answers in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
FRAMES = Counter("video_ma2mba_frames_read", "Frames read.")
CACHED = Counter("video_ma2mba_videos_asked", "Videos of conversations, by whether they were read before.", ["cached"])
WAITING = Gauge("video_ma2mba_waiting", "What waits.", ["what"], multiprocess_mode="livesum")
STORED = Gauge(
    "video_ma2mba_states", "Videos kept, and bytes of their states.", ["what"], multiprocess_mode="mostrecent"
)


def shared() -> bool:
    """Whether there are several processes."""
    return bool(os.environ.get(FOLDER))


def forget_dead() -> None:
    """Leave out what waited in processes that have ended, however they did."""
    for file in Path(os.environ[FOLDER]).glob("gauge_live*_*.db"):
        number = int(file.stem.rpartition("_")[2])
        try:
            os.kill(number, 0)
        except OSError:  # no process, or somebody else's by now
            mark_process_dead(number)


def exposition() -> tuple[bytes, str]:
    """The counters as text, and its media type."""
    registry = REGISTRY
    if shared():
        forget_dead()
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    return generate_latest(registry), CONTENT_TYPE_LATEST
