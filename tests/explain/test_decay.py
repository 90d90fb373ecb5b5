"""Decay weights against the recurrence, step by step: a state that only decays."""

import pytest
import torch

from video_ma2mba.explain import relevance
from video_ma2mba.explain.decay import DecayRecorder
from video_ma2mba.explain.read_features import read_features


def brute_force(model, prompt):
    """(L, H, F): product of exp(dt * A) over every single token behind each frame, up to the end of the question."""
    embed = model.get_input_embeddings()
    x = torch.cat([embed(prompt.opening), prompt.features.flatten(0, 1), embed(prompt.asked)])[None]
    language = model.model.language_model
    frames, per_frame = prompt.features.shape[:2]
    outs = []
    hooks = [
        layer.mixer.in_proj.register_forward_hook(lambda _, __, out: outs.append(out[0])) for layer in language.layers
    ]
    language.prefill_segment_length, before = 10**6, language.prefill_segment_length
    with torch.no_grad():
        language(inputs_embeds=x)
    language.prefill_segment_length = before
    for hook in hooks:
        hook.remove()
    result = torch.ones(len(outs), language.config.num_heads, frames, dtype=torch.float64)
    for number, (layer, out) in enumerate(zip(language.layers, outs, strict=True)):
        for head in range(language.config.num_heads):
            raw = out[:, out.shape[1] - language.config.num_heads + head]
            a = -layer.mixer.A_log[head].double().exp()
            for frame in range(frames):
                for token in range(len(prompt.opening) + (frame + 1) * per_frame, x.shape[1]):
                    dt = (raw[token].double() + layer.mixer.dt_bias[head].double()).exp().log1p()
                    result[number, head, frame] *= (dt * a).exp()
    return result


@pytest.mark.parametrize("frames", [1, 3, 6])
def test_weights_are_the_products_of_every_token(parts, clip, frames: int):
    model, processor = parts
    prompt = read_features(model, processor, clip(frames), "Who?")
    expected = brute_force(model, prompt)
    assert expected.min() > 0 and expected.max() < 1
    found = relevance(model, processor, clip(frames), "Who?", "ab", steps=0)
    torch.testing.assert_close(torch.from_numpy(found.decay), expected.mean(dim=(0, 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.from_numpy(found.decay_by_layer), expected.mean(dim=1), rtol=1e-6, atol=0)
    assert (torch.from_numpy(found.decay).diff() > 0).all()  # what is later decays less

    other = relevance(model, processor, clip(frames), "Who?", "another answer", steps=1)
    torch.testing.assert_close(torch.from_numpy(other.decay), torch.from_numpy(found.decay))  # of any answer


def test_recording_does_not_depend_on_the_cuts(parts, clip):
    model, processor = parts
    prompt = read_features(model, processor, clip(5), "Who?")
    language = model.model.language_model
    x = prompt.features.flatten(0, 1)[None]
    places = torch.arange(5).repeat_interleave(4)
    weights = []
    for length in (1, 3, 16, 100):
        language.prefill_segment_length, before = length, language.prefill_segment_length
        recorder = DecayRecorder(language, 5)
        with recorder.recording(places), torch.no_grad():
            language(inputs_embeds=x)
        language.prefill_segment_length = before
        weights.append(recorder.weights())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-6, atol=0)
    assert (weights[0][:, :, -1] == 1).all()  # nothing follows the last frame
