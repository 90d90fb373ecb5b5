"""Methods that trainers replace on a model: copies, pickled and compiled ones compute with their own weights."""

import copy
import io
from types import MethodType

import pytest
import torch

from video_ma2mba.modeling_video_ma2mba.decode_graph import force_decoding
from video_ma2mba.trainer.answer_scores import install_answer_scores, replaced_function
from video_ma2mba.trainer.reward_trainers import install_coded_prompts

IDS = torch.tensor([[7, 8, 9, 10]])


def scores(model) -> torch.Tensor:
    return model(IDS, labels=IDS, fused_lm_head=True).log_probs


def scaled(model, factor: float):
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(factor)
    return model


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, pickled], ids=["deepcopy", "copy", "pickle"])
def test_a_copy_runs_its_own_weights(make_model, again):
    told, model = [], make_model()
    plain = scaled(make_model(), 3.0)
    install_answer_scores(model, told.append)
    made = again(model)
    if again is copy.copy:  # shares the weights
        plain = make_model()
        assert made.forward.__func__ is model.forward.__func__
    else:
        scaled(made, 3.0)
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, plain(IDS).logits)
        torch.testing.assert_close(made.generate(IDS, max_new_tokens=4), plain.generate(IDS, max_new_tokens=4))
        torch.testing.assert_close(model(IDS).logits, make_model()(IDS).logits)
        if again is copy.deepcopy:
            install_answer_scores(plain, told.append)
            torch.testing.assert_close(scores(made), scores(plain))


def test_a_copy_with_coded_prompts_runs_its_own_weights(make_model):
    model, plain = make_model(), scaled(make_model(), 3.0)
    install_coded_prompts(model, coder=None, temperature=1.0)
    made = scaled(copy.deepcopy(model), 3.0)
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, plain(IDS).logits)
    assert made.generate.__self__ is made and made.forward.__self__ is made


def test_a_replacement_is_built_upon(make_model):
    model, seen = make_model(), []
    first = replaced_function(model, "forward")

    def forward(self, *args, **kwargs):
        seen.append(self)
        return first(self, *args, **kwargs)

    model.forward = MethodType(forward, model)
    install_answer_scores(model, lambda scores: None)
    made = copy.deepcopy(model)
    made(IDS)
    assert len(seen) == 1 and seen[0] is made


def test_a_compiled_model_runs_what_was_replaced(make_model):
    model, seen = make_model(), []
    install_answer_scores(model, seen.append)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, make_model()(IDS).logits)
        torch.testing.assert_close(scores(compiled), scores(model))


def test_a_decoder_does_not_go_past_a_replaced_forward(make_model):
    """Kernels that know the weights only would; what trainers put there for scores changes no token."""
    model = make_model(text={"n_groups": 1})
    model.generation_config.eos_token_id = None
    with force_decoding("steps"):
        expected = model.generate(IDS, max_new_tokens=4).tolist()
        install_answer_scores(model, lambda scores: None)
        assert model.generate(IDS, max_new_tokens=4).tolist() == expected
        for part in (model, model.model, model.model.language_model.layers[0].mixer.in_proj):
            plain, seen = part.forward, []
            part.forward = lambda *args, plain=plain, seen=seen, **kwargs: (seen.append(1), plain(*args, **kwargs))[1]
            assert model.generate(IDS, max_new_tokens=4).tolist() == expected
            assert len(seen) == 4
            part.forward = plain
