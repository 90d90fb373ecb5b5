"""The decoding loop over fixed buffers, here without graphs and on the CPU, equals transformers' loop."""

import pytest
import torch
from transformers import TextStreamer

from video_ma2mba.modeling_video_ma2mba import decode_graph, decode_loop
from video_ma2mba.modeling_video_ma2mba.decode_graph import force_decoding

VIDEO, PER_FRAME, NEW = 2, 4, 7


@pytest.fixture
def model(make_model):
    made = make_model(text={"num_hidden_layers": 3, "n_groups": 1})
    made.generation_config.eos_token_id = None
    made.generation_config.suppress_tokens = None
    return made


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """Batch sizes of the runs that really went through the fast loop."""
    runs = []
    plain = decode_loop._DecoderSteps.read

    def counted(self, *args, **kwargs):
        runs.append(self.state.batch_size)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(decode_loop._DecoderSteps, "read", counted)
    return runs


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, 262, (1, length), generator=torch.Generator().manual_seed(seed))


def left_padded(*rows: torch.Tensor) -> dict[str, torch.Tensor]:
    longest = max(row.shape[1] for row in rows)
    ids, mask = torch.ones(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - row.shape[1] :], mask[i, longest - row.shape[1] :] = row[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def both(model, used, fast_runs: int = 1, **settings) -> tuple:
    """The same call by transformers' loop and by ours."""
    found = []
    for way in ("eager", "steps"):
        torch.manual_seed(3)
        state = settings.get("past_key_values")
        again = {} if state is None else {"past_key_values": state.fork()}
        with force_decoding(way):
            found.append(
                model.generate(
                    **{**settings, **again}, max_new_tokens=NEW, return_dict_in_generate=True, pad_token_id=0
                )
            )
    assert len(used) == fast_runs
    return tuple(found)


def assert_same(eager, fast) -> None:
    assert fast.sequences.tolist() == eager.sequences.tolist()
    theirs, ours = eager.past_key_values, fast.past_key_values
    assert ours.seen_tokens == theirs.seen_tokens
    torch.testing.assert_close(ours.conv, theirs.conv, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.ssm, theirs.ssm, rtol=1e-4, atol=1e-5)
    assert type(fast) is type(eager)


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_greedy_tokens_and_state(model, used, slots):
    model.decode_slots = slots
    assert_same(*both(model, used, input_ids=text(9)))
    batch = left_padded(text(5, 1), text(11, 2), text(1, 3))
    eager, fast = both(model, used, fast_runs=2, **batch)
    assert_same(eager, fast)
    assert len({tuple(row) for row in fast.sequences.tolist()}) == 3


@pytest.mark.parametrize("groups", [1, 2])
def test_groups(make_model, used, groups):
    model = make_model(text={"n_groups": groups})
    model.generation_config.eos_token_id = None
    for batch in (left_padded(text(6)), left_padded(text(6), text(4))):
        used.clear()
        assert_same(*both(model, used, **batch))


def test_a_video_before_the_answer(model, used, raw_pixels):
    ids = torch.cat([text(2), torch.full((1, 3 * PER_FRAME), VIDEO), text(4, 1)], dim=1)
    assert_same(*both(model, used, input_ids=ids, pixel_values_videos=raw_pixels(3)))


@pytest.mark.parametrize("question", [1, 5, 20, 300])
def test_from_a_state(model, used, question):
    with torch.no_grad():
        state = model(input_ids=text(12)).past_key_values
    kept = state.fork()
    mask = torch.ones(1, 12 + question, dtype=torch.long)
    assert_same(*both(model, used, input_ids=text(question, 1), attention_mask=mask, past_key_values=state))
    assert torch.equal(state.ssm, kept.ssm) and torch.equal(state.conv, kept.conv)


def test_rows_end_where_they_should(model, used):
    batch = left_padded(text(5, 1), text(8, 2), text(3, 3))
    with force_decoding("eager"):
        free = model.generate(**batch, max_new_tokens=NEW)[:, 8:]
    ends = [int(free[0, 2]), int(free[1, 4]), int(free[2, 1])]
    eager, fast = both(model, used, eos_token_id=ends, **batch)
    assert_same(eager, fast)
    assert fast.sequences.shape[1] < 8 + NEW, "all rows end early"
    assert (fast.sequences[:, -1] == 0).any(), "rows that ended are padded"


def test_sampling_processors_scores_and_criteria(model, used):
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3}
    eager, fast = both(
        model, used, output_scores=True, output_logits=True, **settings, **left_padded(text(5), text(7))
    )
    assert_same(eager, fast)
    for ours, theirs in zip((*fast.scores, *fast.logits), (*eager.scores, *eager.logits), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    seen = []
    stop = [lambda ids, scores, **_: torch.tensor([seen.append(ids.shape[1]) is not None or ids.shape[1] >= 8])]
    assert_same(*both(model, used, fast_runs=2, input_ids=text(5), stopping_criteria=stop))
    assert seen == [6, 7, 8] * 2


def test_streamer_sees_every_token(model, used, make_recorder):
    for settings in ({}, {"do_sample": True}):
        recorder = make_recorder()
        with force_decoding("steps"):
            found = model.generate(text(4), max_new_tokens=NEW, streamer=recorder, **settings)
        assert recorder.got == [*found[0].tolist(), "end"]
    assert len(used) == 2


def test_what_is_not_a_plain_model_decodes_as_usual(model, used):
    assert_same(*both(model, used, input_ids=text(4)))
    handle = model.model.language_model.layers[1].mixer.in_proj.register_forward_hook(lambda *_: None)
    both(model, used, input_ids=text(4))
    handle.remove()
    model.fast_decoding = False
    both(model, used, input_ids=text(4))
    model.fast_decoding = True
    both(model, used, num_beams=2, input_ids=text(4))
    model.double()
    both(model, used, input_ids=text(4))


def test_changed_weights_are_seen(model, used):
    both(model, used, input_ids=text(4))
    with torch.no_grad():
        model.model.language_model.layers[0].mixer.in_proj.weight.mul_(-1.5)  # in place
    assert_same(*both(model, used, fast_runs=2, input_ids=text(4)))
    mixer = model.model.language_model.layers[1].mixer
    mixer.out_proj.weight = torch.nn.Parameter(mixer.out_proj.weight * -2)  # another tensor
    assert_same(*both(model, used, fast_runs=3, input_ids=text(4)))


def test_generating_inside_generating(model, used):
    """A streamer that asks the model something: the buffers are taken, so the inner answer goes the usual way."""
    inner = []

    class Asking(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            inner.append(model.generate(text(3, 5), max_new_tokens=4).tolist())

        def end(self):
            pass

    with force_decoding("steps"):
        found = model.generate(text(4), max_new_tokens=NEW, streamer=Asking())
        assert used == [1] * (1 + 1), "the prompt is announced before the loop begins"
        assert found.tolist() == model.generate(text(4), max_new_tokens=NEW).tolist()
        assert inner[-1] == model.generate(text(3, 5), max_new_tokens=4).tolist()


def test_in_and_out_of_inference_mode(model, used):
    with force_decoding("steps"):
        with torch.inference_mode():
            first = model.generate(text(4), max_new_tokens=NEW)
        assert model.generate(text(4), max_new_tokens=NEW).tolist() == first.tolist()
    assert len(used) == 2


def test_few_decoders_are_kept(model):
    with force_decoding("steps"):
        for rows in (1, 2, 3, 1):
            model.generate(text(4).repeat(rows, 1), max_new_tokens=NEW)
        assert list(decode_graph._kept[model].decoders) == [3, 1]
    model.release_decoders()
    assert model not in decode_graph._kept


def test_sixteen_bit_states_stay_close(model, used):
    model.decode_state_dtype, model.decode_slots = torch.bfloat16, 4
    eager, fast = both(model, used, input_ids=text(9))
    error = (fast.past_key_values.ssm - eager.past_key_values.ssm).norm() / eager.past_key_values.ssm.norm()
    assert 1e-5 < error < 0.02
