"""The published formulas against the published numbers."""

import pytest

from video_ma2mba import Ma2mbaTextConfig
from video_ma2mba.planning.paper_formulas import (
    TABLE_7,
    PaperConstants,
    full_cost,
    full_optimum,
    reference_code_cost,
    reference_code_optimum,
    unit_cost,
    unit_optimum,
)

SIZES = {"370m": (1024, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}


def config(name: str) -> Ma2mbaTextConfig:
    width, layers = SIZES[name]
    return Ma2mbaTextConfig(hidden_size=width, num_hidden_layers=layers)


@pytest.mark.parametrize("constant", ["layer", "sequence", "grid", "state"])
@pytest.mark.parametrize("name", SIZES)
def test_every_constant_of_table_7(name: str, constant: str):
    assert getattr(PaperConstants.of(config(name)), constant) == TABLE_7[name][constant]


@pytest.mark.parametrize(
    ("name", "sequence", "state"), [("370m", 531200, 6016), ("1.3b", 1061632, 11264), ("2.7b", 1326848, 13888)]
)
def test_constants_of_the_reference_code(name: str, sequence: int, state: int):
    constants = PaperConstants.of_reference_code(config(name))
    assert (constants.layer, constants.sequence, constants.state) == (3 * SIZES[name][0], sequence, state)
    assert constants.grid == TABLE_7[name]["grid"]


@pytest.mark.parametrize(
    ("power", "segment", "block", "gigabytes"),
    [(14, 2048, 16, 3.03), (16, 4096, 22, 7.50), (18, 6400, 32, 17.4), (19, 6400, 64, 26.8)],
)
def test_choices_of_the_reference_code(power: int, segment: int, block: int, gigabytes: float):
    constants = PaperConstants.of_reference_code(config("2.7b"))
    found = reference_code_optimum(constants, 64, 2**power)
    assert found[:2] == (block, segment)
    assert 2 * found[2] / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert found[2] == reference_code_cost(constants, 64, 2**power, block, segment)


def test_reference_code_keeps_short_sequences_in_one_cell():
    constants = PaperConstants.of_reference_code(config("370m"))
    assert reference_code_optimum(constants, 48, 200)[:2] == (48, 200)


@pytest.mark.parametrize(("layers", "tokens"), [(64, 2**11), (64, 4096), (64, 2**20), (300, 256)])
def test_unit_optimum_is_the_minimum(layers: int, tokens: int):
    block, segment, cost = unit_optimum(layers, tokens)
    assert 1 <= block <= layers * 1.0001 and 1 <= segment <= tokens * 1.0001
    smallest = min(unit_cost(layers, tokens, b, s) for b in range(1, layers + 1) for s in range(1, tokens + 1, 7))
    assert cost <= smallest * 1.001
    if layers**2 > tokens and tokens**2 > layers:
        assert cost == pytest.approx(3 * (layers * tokens) ** (2 / 3))
    else:
        assert cost == pytest.approx(tokens + 2 * layers * tokens**0.5)


@pytest.mark.parametrize("power", [10, 14, 19, 23])
@pytest.mark.parametrize("name", SIZES)
def test_full_optimum_is_the_minimum_inside_and_at_the_borders(name: str, power: int):
    constants, layers, tokens = PaperConstants.of(config(name)), SIZES[name][1], 2**power
    block, segment, cost = full_optimum(constants, layers, tokens)
    assert 1 <= block <= layers and 1 <= segment <= tokens

    def without_state(b: float, s: float) -> float:
        return full_cost(constants, layers, tokens, b, s) - s * constants.state

    assert cost == pytest.approx(without_state(block, segment))
    steps = [1.03**k for k in range(-40, 41)]
    around = (
        without_state(min(layers, max(1.0, block * b)), min(tokens, max(1.0, segment * s)))
        for b in steps
        for s in steps
    )
    assert cost <= min(around) * (1 + 1e-9)
