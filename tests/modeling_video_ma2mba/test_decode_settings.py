"""The loop by which our own verbs decode gives what `generate()` gives, setting by setting."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from video_ma2mba import VideoState
from video_ma2mba.modeling_video_ma2mba.decode_graph import force_decoding
from video_ma2mba.modeling_video_ma2mba.decode_loop import decode
from video_ma2mba.modeling_video_ma2mba.decode_settings import settled, unsupported_settings

VIDEO, NEW = 2, 8


@pytest.fixture(scope="module")
def model(make_model):
    made = make_model(dtype=torch.float64)
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 1
    return made


@pytest.fixture(scope="module")
def states(model) -> list:
    with torch.no_grad():
        return [
            model(input_ids=torch.randint(6, 262, (1, 9), generator=torch.Generator().manual_seed(i))).past_key_values
            for i in range(3)
        ]


QUESTIONS = [[20, 30, 40, 30], [50, 60], [70, 80, 90]]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, QUESTIONS))
    rows = [[1] * (longest - len(q)) + q for q in QUESTIONS]
    return torch.tensor(rows), torch.tensor([[int(t != 1) for t in row] for row in rows])


def by_generate(model, states, way="eager", **settings):
    ids, mask = batch()
    full = torch.cat([mask.new_ones(3, 9), mask], dim=1)
    torch.manual_seed(7)
    with force_decoding(way):
        found = model.generate(
            ids,
            attention_mask=full,
            past_key_values=VideoState.concatenate(states),
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
    return found.sequences[:, ids.shape[1] :], found


def by_loop(model, states, **settings):
    ids, mask = batch()
    names = {"logits_processor": "processors", "stopping_criteria": "criteria", "prefix_allowed_tokens_fn": "allowed"}
    extra = {ours: settings.pop(theirs) for theirs, ours in names.items() if theirs in settings}
    extra |= {name: settings.pop(name) for name in ("seed", "streamer", "tokenizer") if name in settings}
    output = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    config, rest = settled(model.generation_config, None, settings | output)
    assert not rest and not unsupported_settings(config)
    torch.manual_seed(7)
    return decode(model, states, ids, config, mask=mask, log_probabilities=True, **extra)


SETTINGS = {
    "greedy": {},
    "max_length": {"max_length": 9, "max_new_tokens": None},
    "sampled": {"do_sample": True},
    "temperature, top_k, top_p": {"do_sample": True, "temperature": 3.0, "top_k": 40, "top_p": 0.9},
    "all tokens": {"do_sample": True, "top_k": 0},
    "top_k off": {"do_sample": True, "top_k": None},
    "min_p": {"do_sample": True, "min_p": 0.3, "top_k": 0},
    "typical, epsilon, eta": {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "no n-gram twice": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[i] for i in range(6, 100)] + [[101, 102]]},
    "ends": {"eos_token_id": list(range(6, 120))},
    "not before": {"eos_token_id": list(range(6, 200)), "min_new_tokens": 3},
    "min_length": {"eos_token_id": list(range(6, 200)), "min_length": 7},
    "suppressed": {"suppress_tokens": list(range(6, 150)), "begin_suppress_tokens": list(range(150, 250))},
    "forced": {"forced_eos_token_id": 9, "forced_bos_token_id": 8},
    "bias": {"sequence_bias": {(17,): 50.0, (18, 19): 3.0}},
    "decay": {"eos_token_id": 9, "exponential_decay_length_penalty": (2, 1.5)},
    "normalised": {"renormalize_logits": True, "remove_invalid_values": True},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(6 + 10 * row, 16 + 10 * row))},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_gives_the_tokens_of_generate(model, states, name):
    settings = {"max_new_tokens": NEW} | SETTINGS[name]
    expected, theirs = by_generate(model, states, **settings)
    found = by_loop(model, states, **settings)
    assert found.tokens.tolist() == expected.tolist()
    for ours, other in zip((*found.logits, *found.scores), (*theirs.logits, *theirs.scores), strict=True):
        torch.testing.assert_close(ours, other)
    values = model.compute_transition_scores(theirs.sequences, theirs.logits, normalize_logits=True)
    torch.testing.assert_close(found.log_probabilities, values, rtol=1e-4, atol=1e-5)
    if name == "ends":
        assert not all(found.ended) or len(set(found.lengths)) > 1
        for row, length, ended in zip(found.tokens.tolist(), found.lengths, found.ended, strict=True):
            assert ended == (row[length - 1] in settings["eos_token_id"])
            assert set(row[length:]) <= {1}
    assert all(state.seen_tokens == 9 for state in states), "states that are asked stay as they are"


def test_processors_and_criteria_of_the_caller(model, states):
    class Only(LogitsProcessor):
        def __call__(self, ids, scores):
            return scores.masked_fill(torch.arange(scores.shape[1]) % 3 != 0, -torch.inf)

    class Long(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((ids.shape[0],), ids.shape[1] >= 8)

    settings = {"logits_processor": [Only()], "stopping_criteria": [Long()], "max_new_tokens": NEW}
    expected, _ = by_generate(model, states, **settings)
    found = by_loop(model, states, **settings)
    assert found.tokens.tolist() == expected.tolist()
    assert found.tokens.shape[1] == 4 and (found.tokens % 3 == 0).all()
    assert found.ended == [True] * 3


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"repetition_penalty": 5.0}])
def test_an_answer_does_not_depend_on_the_batch(model, states, settings):
    """Padding is no text: nothing counts it, not even where it is also the token that ends answers."""
    seeds = {"seed": [4, 5, 6]} if settings.get("do_sample") else {}
    found = by_loop(model, states, max_new_tokens=NEW, pad_token_id=30, eos_token_id=30, **settings, **seeds)
    for row, (state, question) in enumerate(zip(states, QUESTIONS, strict=True)):
        one = {"seed": 4 + row} if seeds else {}
        config, _ = settled(
            model.generation_config, None, {"max_new_tokens": NEW, "pad_token_id": 30, "eos_token_id": 30} | settings
        )
        alone = decode(model, [state], torch.tensor([question]), config, **one)
        length = alone.lengths[0]
        assert found.tokens[row, :length].tolist() == alone.tokens[0, :length].tolist()
        assert found.lengths[row] == length


def test_a_seed_is_torchs_own(model, states):
    torch.manual_seed(0)
    found = by_loop(model, states, do_sample=True, max_new_tokens=NEW, seed=7)  # by_loop seeds torch with 7, too
    again = by_loop(model, states, do_sample=True, max_new_tokens=NEW)
    assert found.tokens.tolist() == again.tokens.tolist()
    other = by_loop(model, states, do_sample=True, max_new_tokens=NEW, seed=8)
    assert found.tokens.tolist() != other.tokens.tolist()
    with pytest.raises(ValueError, match="2 seeds were given for 3 rows"):
        by_loop(model, states, do_sample=True, max_new_tokens=NEW, seed=[1, 2])


@pytest.mark.parametrize("way", ["eager", "steps"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_streamer_for_each_row(make_model, make_recorder, way, sampled):
    model = make_model()
    model.generation_config.pad_token_id = 1
    with torch.no_grad():
        states = [model(input_ids=torch.tensor([[20 + i] * 9])).past_key_values for i in range(3)]
    recorders = [make_recorder(), None, make_recorder()]
    with force_decoding(way):
        ends = {"eos_token_id": list(range(6, 150)), "do_sample": sampled, "max_new_tokens": NEW}
        found = by_loop(model, states, streamer=recorders, **ends)
        plain = by_loop(model, states, **ends)
    assert found.tokens.tolist() == plain.tokens.tolist()
    for row in (0, 2):
        assert recorders[row].got == [*found.tokens[row, : found.lengths[row]].tolist(), "end"]


def test_what_only_generate_can_do_is_named():
    for asked, name in (
        ({"num_beams": 3}, "num_beams"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
    ):
        config, _ = settled(GenerationConfig(), None, asked)
        assert name in unsupported_settings(config), asked
    config, rest = settled(GenerationConfig(), None, {"temprature": 2})
    assert rest == {"temprature": 2} and unsupported_settings(config) == []


def test_call_before_configuration_before_model_before_defaults():
    own = GenerationConfig(temperature=0.5, top_k=7, max_new_tokens=3)
    config, _ = settled(own, GenerationConfig(top_k=9), {"max_new_tokens": 4})
    assert (config.temperature, config.top_k, config.max_new_tokens, config.top_p) == (0.5, 9, 4, 1.0)
    assert settled(own, None, {})[0].top_k == 7 and settled(GenerationConfig(), None, {})[0].top_k == 50
    assert own.top_p is None or own.top_p == 1.0, "the model's own configuration stays as it is"
