"""Who may use a model that several want."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """The model for one user at a time; whoever waits comes next, however busy the other is."""

    def __init__(self) -> None:
        self._next, self._model = threading.Lock(), threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Holds the model."""
        with self._next:
            self._model.acquire()
        try:
            yield
        finally:
            self._model.release()
