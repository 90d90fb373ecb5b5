"""The pool of host memory: pieces never overlap, and steps of ever new sizes live in the same memory.

Page-locking needs a GPU; here the pool cuts ordinary memory, in small slabs.
"""

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from video_ma2mba.modeling_video_ma2mba import recompute_store
from video_ma2mba.modeling_video_ma2mba.recompute_store import DeviceStore, PinnedPool

SLAB = 64 * 512


@pytest.fixture(scope="module", autouse=True)
def _ordinary_memory():
    patch = pytest.MonkeyPatch()
    patch.setattr(recompute_store, "SLAB_BYTES", SLAB)
    patch.setattr(PinnedPool, "_new_slab", lambda self, nbytes: torch.empty(nbytes, dtype=torch.uint8))
    patch.setattr(PinnedPool, "release", PinnedPool.__init__)
    yield
    patch.undo()


@settings(max_examples=100, deadline=None)
@given(actions=st.lists(st.one_of(st.integers(1, 2 * SLAB), st.floats(0, 0.99)), max_size=60))
def test_pieces_in_use_never_overlap(actions):
    """Numbers of bytes ask for a piece, fractions give one of those in use back."""
    pool, lent = PinnedPool(), []
    for action in actions:
        if isinstance(action, int):
            piece = pool.get(action)
            assert piece.nbytes >= action and piece.data_ptr() % 16 == 0
            lent.append(piece)
        elif lent:
            pool.give_back(lent.pop(int(action * len(lent))))
        spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in lent)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
        assert pool.nbytes >= sum(p.nbytes for p in lent)


def test_steps_of_new_sizes_do_not_grow_the_pool():
    """Videos of every length: each step's last segment has another size than any before."""
    pool = PinnedPool()
    for length in range(1, 400):
        pieces = [pool.get(5000) for _ in range(8)] + [pool.get(10 * length) for _ in range(8)]
        for piece in reversed(pieces):
            pool.give_back(piece)
    assert pool.nbytes <= 4 * SLAB


def test_pieces_given_back_within_a_step_are_reused_in_it():
    pool = PinnedPool()
    held = pool.get(700)
    for _ in range(500):
        pool.give_back(pool.get(5000))
    assert pool.nbytes == SLAB
    pool.give_back(held)


def test_reserved_memory_is_used_first():
    pool = PinnedPool()
    pool.reserve(3 * SLAB - 5)
    assert pool.nbytes == 3 * SLAB
    pieces = [pool.get(SLAB) for _ in range(3)]
    assert pool.nbytes == 3 * SLAB
    pool.reserve(3 * SLAB)
    assert pool.nbytes == 3 * SLAB
    for piece in pieces:
        pool.give_back(piece)


def test_expected_memory_is_locked_meanwhile_and_only_once(monkeypatch):
    """Slabs hold whole pieces and come from another thread; what is there already counts, what is smaller waits."""
    made, may = [], threading.Event()

    def slow(self, nbytes):
        may.wait(10)
        made.append((nbytes, threading.current_thread() is threading.main_thread()))
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(PinnedPool, "_new_slab", slow)
    pool, size = PinnedPool(), SLAB // 3 + 1
    pool.expect(5, size)  # returns although nothing can be made yet
    may.set()
    pieces = [pool.get(size) for _ in range(5)]
    rounded = pieces[0].nbytes
    assert made == [(2 * rounded, False), (2 * rounded, False), (rounded, False)]
    assert pool.nbytes == 5 * rounded
    for piece in pieces:
        pool.give_back(piece)
    pool.expect(5, size)
    pool.expect(4, size - 600)
    assert len(made) == 3
    pool.expect(6, size)
    held = [pool.get(3 * SLAB), *(pool.get(size) for _ in range(6))]  # the first is too large for what is on its way
    assert made[3:] == [(rounded, False), (3 * SLAB, True)]
    assert len({piece.data_ptr() for piece in held}) == 7


def test_memory_that_cannot_be_locked_is_told_where_it_is_needed(monkeypatch):
    def refuse(self, nbytes):
        raise MemoryError("no more")

    pool = PinnedPool()
    monkeypatch.setattr(PinnedPool, "_new_slab", refuse)
    pool.expect(1, 100)
    with pytest.raises(MemoryError, match="no more"):
        pool.get(100)


def test_a_piece_larger_than_a_slab_leaves_the_slabs_to_others():
    pool = PinnedPool()
    pool.reserve(2 * SLAB)
    for _ in range(3):
        pieces = [pool.get(size) for size in (3 * SLAB, SLAB // 2, SLAB, SLAB // 2)]
        assert pool.nbytes == 5 * SLAB
        for piece in pieces:
            pool.give_back(piece)


def test_a_piece_from_before_a_release_is_not_handed_out_again():
    pool = PinnedPool()
    old = pool.get(512)
    pool.release()
    new = pool.get(512)
    pool.give_back(old)  # a forward pass that was pending when checkpointing was switched off
    assert pool.get(512).data_ptr() not in (old.data_ptr(), new.data_ptr())


def test_a_device_store_forgets_what_it_handed_out():
    store = DeviceStore()
    tensors = [torch.ones(2)]
    store.put("a", tensors)
    store.put("b", tensors)
    assert store.take("a") is tensors
    with pytest.raises(KeyError):
        store.take("a")
    store.finish()
    with pytest.raises(KeyError):
        store.take("b")
