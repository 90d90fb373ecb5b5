"""Numbers of processes, from the launcher's announcements and from device meshes."""

from types import SimpleNamespace

import pytest

from video_ma2mba.modeling_video_ma2mba.parallel_dims import ParallelDims, process_group_exists


def mesh(shape: tuple[int, ...], names: tuple[str, ...] | None, place: tuple[int, ...]) -> SimpleNamespace:
    return SimpleNamespace(shape=shape, ndim=len(shape), mesh_dim_names=names, get_coordinate=lambda: list(place))


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    dims = ParallelDims.of_run()
    assert dims == ParallelDims() and dims.first and dims.world == dims.batches == 1
    assert not process_group_exists()


def test_the_launcher_announces_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "12")
    monkeypatch.setenv("RANK", "7")
    dims = ParallelDims.of_run(shard=2, sequence=3)
    assert (dims.data, dims.shard, dims.sequence, dims.rank) == (2, 2, 3, 7)
    assert (dims.world, dims.batches, dims.batch_rank, dims.sequence_rank, dims.first) == (12, 4, 2, 1, False)
    with pytest.raises(ValueError, match="12 processes cannot be dealt out to shard=1 x sequence=5"):
        ParallelDims.of_run(sequence=5)


def test_processes_of_one_sample_are_neighbours():
    """Ranks that share a sample follow each other: their borders stay within a host."""
    places = [(d.batch_rank, d.sequence_rank) for d in (ParallelDims(2, 1, 3, rank) for rank in range(6))]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(
    ("given", "dims"),
    [
        (mesh((4,), None, (3,)), ParallelDims(shard=4, rank=3)),  # what fully_shard takes
        (mesh((2, 4), None, (1, 3)), ParallelDims(data=2, shard=4, rank=7)),
        (mesh((2, 4), ("dp_replicate", "dp_shard"), (1, 0)), ParallelDims(data=2, shard=4, rank=4)),
        (mesh((2, 4), ("data", "sequence"), (1, 2)), ParallelDims(data=2, sequence=4, rank=6)),
        (mesh((4, 2), ("sp", "data"), (3, 1)), ParallelDims(data=2, sequence=4, rank=7)),
        (mesh((2, 2, 2), ("dp_replicate", "dp_shard", "cp"), (0, 1, 1)), ParallelDims(2, 2, 2, 3)),
        (mesh((8,), ("dp_shard_cp",), (5,)), ParallelDims(shard=8, rank=5)),
    ],
)
def test_meshes(given, dims):
    assert ParallelDims.of_mesh(given) == dims


def test_unknown_meshes_and_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="has dimensions other than data, shard, sequence"):
        ParallelDims.of_mesh(mesh((2, 2, 2), ("pp", "dp", "tp"), (0, 0, 0)))
    with pytest.raises(ValueError, match="sequence=0 is not valid"):
        ParallelDims(sequence=0)
    with pytest.raises(ValueError, match="rank=2 is not one of 2 processes"):
        ParallelDims(data=2, rank=2)
