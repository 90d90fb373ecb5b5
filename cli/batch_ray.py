"""`video-ma2mba batch --ray`: the work of a queue spread over a Ray cluster, one worker a GPU (or a core).

Placing workers, starting them again where they die, and trying their work again is Ray's; here is what they do, and
what becomes of work that ends several workers in a row.
"""

import socket
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from .batch_queue import Item
from .batch_work import Worker, note_contents
from .errors import one_line
from .terminal import note, step

_TRIES = 3
_LOOK_SECONDS = 1.0


class ClusterWorker:
    """Lives in a process of its own: loads the model once, then reads and answers group after group."""

    def __init__(self, loading: dict[str, Any], work: dict[str, Any]):
        self._loading, self._work = loading, work

    @cached_property
    def _worker(self) -> Worker:
        """Loaded with the first task: what is wrong with the model is that task's error, not a death to be retried."""
        from video_ma2mba.loading import load_pipeline

        return Worker(load_pipeline(**self._loading), **self._work)

    def settings(self) -> dict[str, Any]:
        """What all results of a file share; see `Worker.settings`."""
        return self._worker.settings()

    def noted(self, items: list[Item], folder: str | None) -> list[Item]:
        """Items with the digests of what their videos hold now."""
        note_contents(items, folder)
        return items

    def answered(self, group: list[Item]) -> list[dict[str, Any]]:
        """The results of some items, with the digests of what their videos hold."""
        note_contents(group, self._work["folder"])
        return list(self._worker.answered(group))


def _refuse_silence(address: str) -> None:
    """Ray waits for more than a minute for a cluster that does not answer."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"--ray {address}: nothing answers there ({error})") from None


class Cluster:
    """Workers on a cluster, as a context.

    Args:
        address: of the cluster (`ray://host:port`, `host:port`); "auto": the one that RAY_ADDRESS or this machine
            names, else one of this machine alone, begun and ended here, which is what "local" always means.
        count: workers; None as many as the cluster's GPUs or, without GPUs, cores allow now.
        gpus, cpus: of each worker, also parts of one; `gpus` None: 1 where the cluster has some.
        loading: of `load_pipeline`. work: of `Worker`, but for its pipeline.

    Raises:
        ImportError: Ray is not installed. ConnectionError: there is no such cluster. ValueError: it has not what a
            worker needs, or no worker can load the model.
    """

    def __init__(
        self,
        address: str,
        count: int | None,
        gpus: float | None,
        cpus: float,
        loading: dict[str, Any],
        work: dict[str, Any],
    ):
        try:
            import ray
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise ImportError("a cluster needs Ray: pip install 'video-ma2mba[ray]'", name="ray") from None
        self._ray = ray
        self._began = not ray.is_initialized()
        if self._began:
            _refuse_silence(address)
            try:
                ray.init(
                    None if address == "auto" else address,
                    log_to_driver=False,
                    logging_level="ERROR",
                    include_dashboard=False if address == "local" else None,
                )
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise ConnectionError(f"--ray {address}: {one_line(error)}") from error
        try:
            there = ray.cluster_resources()
            on_gpus = loading["device"] != "cpu" and there.get("GPU", 0) > 0
            gpus = (1.0 if on_gpus else 0.0) if gpus is None else gpus
            fit = [there.get(name, 0) // each for name, each in (("GPU", gpus), ("CPU", cpus)) if each]
            self.count = int(min(fit, default=1)) if count is None else count
            if self.count < 1:
                wanted = " and ".join(f"{each:g} {name}" for name, each in (("GPU", gpus), ("CPU", cpus)) if each)
                raise ValueError(
                    f"--ray: a worker needs {wanted}, the cluster has {there.get('GPU', 0):g} GPU and "
                    f"{there.get('CPU', 0):g} CPU: lower --ray-gpus or --ray-cpus, or give --ray-workers and wait"
                )
            step(f"Ray {ray.__version__}: {self.count} workers of {gpus:g} GPU and {cpus:g} CPU")
            remote = ray.remote(num_gpus=gpus, num_cpus=cpus, max_restarts=-1, max_task_retries=_TRIES - 1)
            self._workers = [remote(ClusterWorker).remote(loading, work) for _ in range(self.count)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and a cluster that was begun here."""
        if self._began:
            self._ray.shutdown()
            return
        for worker in getattr(self, "_workers", ()):
            self._ray.kill(worker)

    def settings(self) -> dict[str, Any]:
        """Of the first worker that is ready; ValueError or OSError: the model cannot be loaded, or other bad input."""
        ready, _ = self._ray.wait([worker.settings.remote() for worker in self._workers])
        return self._given(ready[0])

    def note_contents(self, items: list[Item], folder: str | None) -> None:
        """Give items the digests of their videos; read on the cluster, in equal shares."""
        videos = {item.video: Item(0, "", item.video) for item in items if item.error is None}
        shares = [list(videos.values())[start :: self.count] for start in range(self.count)]
        tasks = [worker.noted.remote(share, folder) for worker, share in zip(self._workers, shares, strict=True)]
        for task in tasks:
            for known in self._given(task):
                videos[known.video] = known
        for item in items:
            item.shown = videos[item.video].shown if item.error is None else None

    def answered(self, groups: Iterable[list[Item]]) -> Iterator[list[dict[str, Any]]]:
        """The results of groups of items, as they come; a worker gets the next group when it is through with one."""
        waiting, groups = list(self._workers), iter(groups)
        again: list[list[Item]] = []
        running: dict[Any, tuple[Any, list[Item]]] = {}
        while True:
            while waiting and (group := again.pop() if again else next(groups, None)) is not None:
                worker = waiting.pop(0)
                running[worker.answered.remote(group)] = worker, group
            if not running:
                return
            ready, _ = self._ray.wait(list(running), timeout=_LOOK_SECONDS)
            for task in ready:
                worker, group = running.pop(task)
                waiting.append(worker)
                try:
                    yield self._ray.get(task)
                except self._ray.exceptions.RayActorError as error:
                    parts = {}
                    for item in group:
                        parts.setdefault(item.source, []).append(item)
                    if len(parts) > 1:  # one of its videos may be at fault: each alone
                        again += parts.values()
                        continue
                    note(f"{group[0].video}: {_TRIES} workers ended while they read it")
                    reason = f"the worker ended {_TRIES} times while it read this video ({one_line(error)[:200]})"
                    yield [item.result(error=item.error or reason) for item in group]

    def _given(self, task: Any) -> Any:
        """What a task gives, or the error of the worker itself."""
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayActorError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ValueError(f"--ray: no worker could be started: {lines[-1]}") from None
