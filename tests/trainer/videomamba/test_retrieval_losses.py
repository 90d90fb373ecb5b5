"""The losses of retrieval against closed forms, and what must never happen in them."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from video_ma2mba.trainer.videomamba.retrieval_losses import (
    contrastive_loss,
    gathered,
    hard_negatives,
    hide_words,
    same_pairs,
    similarities,
    word_loss,
)


def keys(*rows) -> torch.Tensor:
    return torch.tensor(rows)


def test_pairs_belong_together_by_video_or_by_caption():
    found = same_pairs(keys((1, 10), (1, 11), (2, 10), (3, 12)), keys((1, 10), (3, 13)))
    assert found.tolist() == [[True, False], [True, False], [True, False], [False, True]]


def test_contrast_in_closed_form():
    alone = torch.eye(4).bool()
    assert contrastive_loss(torch.zeros(4, 4), alone).item() == pytest.approx(math.log(4))
    scale = 3.0
    expected = math.log(math.exp(scale) + 3) - scale
    assert contrastive_loss(torch.eye(4) * scale, alone).item() == pytest.approx(expected)
    torch.manual_seed(0)
    logits, same = torch.randn(3, 5).double(), torch.rand(3, 5) < 0.3
    same |= F.one_hot(torch.tensor([0, 1, 2]), 5).bool()
    same[:, 3:] |= F.one_hot(torch.tensor([0, 1]), 3).bool().T
    total = 0.0
    for matrix, mates in ((logits, same), (logits.T, same.T)):
        rows = [-(row.log_softmax(0)[mate]).mean() for row, mate in zip(matrix, mates, strict=True)]
        total += torch.stack(rows).mean() / 2
    assert contrastive_loss(logits, same).item() == pytest.approx(total.item(), abs=1e-12)


def test_similarities_stay_exact_under_autocast():
    video, text = F.normalize(torch.randn(3, 8), dim=-1), F.normalize(torch.randn(4, 8), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = similarities(video, text, torch.tensor(0.07))
    assert found.dtype == torch.float32 and torch.allclose(found, video @ text.T / 0.07)


def test_hard_negatives_are_never_positives():
    generator = torch.Generator().manual_seed(0)
    for seed in range(50):
        torch.manual_seed(seed)
        groups = torch.randint(4, (9, 2)) + torch.tensor([0, 100])
        same = same_pairs(groups, groups)
        logits = torch.where(same, 50.0, torch.randn(9, 9))  # what belongs together is what is most similar
        rows, columns = hard_negatives(logits, same, generator)
        assert not same[rows, columns].any()
        assert rows.tolist() == [row for row in range(9) if not same[row].all()]
    rows, columns = hard_negatives(torch.zeros(2, 2), torch.ones(2, 2).bool())
    assert len(rows) == len(columns) == 0


def test_the_more_similar_is_drawn_more_often():
    logits, same = torch.tensor([[5.0, 2.0, 1.0, 0.0]]).repeat(20000, 1), torch.tensor([[True, False, False, False]])
    _, columns = hard_negatives(logits, same.repeat(20000, 1), torch.Generator().manual_seed(0))
    weights = logits[0].softmax(0)[1:] + 1e-4
    shares = torch.bincount(columns, minlength=4)[1:] / len(columns)
    assert torch.allclose(shares, weights / weights.sum(), atol=0.012)


def test_hidden_words_80_10_10():
    ids = torch.randint(10, 1000, (200, 100), generator=torch.Generator().manual_seed(0))
    kept = torch.zeros_like(ids).bool()
    kept[:, 0] = True
    hidden, asked = hide_words(ids, kept, share=0.5, mask_id=3, words=1000, generator=torch.Generator().manual_seed(1))
    places = asked >= 0
    assert not places[:, 0].any() and torch.equal(asked[places], ids[places])
    assert torch.equal(hidden[~places], ids[~places])
    of = places.sum()
    assert places[:, 1:].float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert ((hidden == 3) & places).sum() / of == pytest.approx(0.8, abs=0.02)
    assert ((hidden == ids) & places).sum() / of == pytest.approx(0.1, abs=0.02)
    logits = torch.randn(4, 7)
    wanted = torch.tensor([1, -100, 5, -100])
    assert word_loss(logits, wanted) == pytest.approx(F.cross_entropy(logits[[0, 2]], wanted[[0, 2]]).item())
    assert word_loss(logits, torch.full((4,), -100)).item() == 0


RANK = """
import sys

sys.path.insert(0, sys.argv[1])
from test_retrieval_losses import contrast_of_two

print(*contrast_of_two(1, sys.argv[2]))
"""


def contrast_of_two(rank: int, folder: str) -> tuple[float, float]:
    """How far loss and gradients (the temperature's among them, averaged as DDP does) of half the pairs in each of two
    processes are from those of one that has all."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    weights = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    temp = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(2, 8, 6, dtype=torch.float64)
    names = torch.tensor([[0, 9], [1, 9], *([n, n] for n in range(2, 8))])

    def gradients(rows: slice, gather) -> tuple[torch.Tensor, list[torch.Tensor]]:
        sides = [F.normalize(each[rows] @ weight, dim=-1) for each, weight in zip(inputs, weights, strict=True)]
        video, text, mates = (gather(each) for each in (*sides, names[rows]))
        loss = contrastive_loss(similarities(video, text, temp), same_pairs(mates, mates))
        return loss, list(torch.autograd.grad(loss, [*weights, temp]))

    try:
        part, shared = gradients(slice(4 * rank, 4 * rank + 4), gathered)
        for gradient in shared:
            distributed.all_reduce(gradient)
            gradient /= 2
    finally:
        distributed.destroy_process_group()
    whole, alone = gradients(slice(None), lambda rows: rows)
    part, whole = part.detach(), whole.detach()
    return abs(float(part - whole)), max(float((a - b).abs().max()) for a, b in zip(shared, alone, strict=True))


def test_two_processes_contrast_as_one(tmp_path):
    command = [sys.executable, "-c", RANK, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        own = contrast_of_two(0, str(tmp_path))
        said, _ = other.communicate(timeout=120)
    assert other.returncode == 0
    assert all(float(each) < 1e-12 for each in (*own, *said.split())), (own, said)
