"""What counts as a difference between two checkouts."""

import pytest
import torch

ONE = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (ONE, ONE.clone(), 0.0),
        (ONE, torch.tensor([1.0, 2.5]), 0.5),
        (torch.tensor(1.0), torch.tensor(1.0), 0.0),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), 0.0),
        (ONE, torch.tensor([1.0, float("nan")]), float("inf")),
        (ONE, ONE.double(), float("inf")),
        (ONE, ONE[:1], float("inf")),
        ("third", "third", 0.0),
        ("third", "second", float("inf")),
        ((1, 2.0), (1, 2.0), 0.0),
        (ONE, "third", float("inf")),
    ],
)
def test_differences(benchmark_script, a, b, expected):
    assert benchmark_script("compare_checkouts").difference(a, b) == expected


def test_bits_count_where_values_are_equal(benchmark_script):
    assert benchmark_script("compare_checkouts").difference(torch.tensor([0.0]), torch.tensor([-0.0])) > 0


def test_noise_is_told_from_change(benchmark_script, capsys):
    before, again = {"same": ONE, "noisy": ONE, "changed": ONE}, {"same": ONE, "noisy": ONE + 0.5, "changed": ONE}
    after = {"same": ONE, "noisy": ONE + 0.75, "changed": ONE + 1e-6, "new": 1}
    assert benchmark_script("compare_checkouts").report(before, after, again) == 2
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[:-1])
    assert said["same"] == "equal"
    assert said["noisy"].startswith("within the noise, by 0.75")
    assert said["changed"].startswith("DIFFERENT, by 9.5")
    assert said["new"] == "MISSING in the first checkout"
