"""The whole model: placement of frames, loss, checkpointing switch, loading and saving, bad input."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.loss.loss_utils import ForCausalLMLoss

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaModel

VIDEO = 2
PER_FRAME = 4


def prompt(frames: int, before: int = 2, after: int = 3) -> torch.Tensor:
    ids = [*range(10, 10 + before), *[VIDEO] * (frames * PER_FRAME), *range(30, 30 + after)]
    return torch.tensor([ids])


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - row.shape[1] :] = row[0]
        mask[i, longest - row.shape[1] :] = 1
    return ids, mask


@pytest.mark.parametrize("vision", [{}, {"model_type": "siglip_vision_model"}])
def test_frames_take_the_places_of_their_placeholders(make_model, raw_pixels, vision):
    model = make_model(dtype=torch.float64, vision=vision)
    ids, pixels = prompt(5), raw_pixels(5)
    with torch.no_grad():
        features = model.get_video_features(pixels)
        assert features.shape == (5 * PER_FRAME, 16)
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == VIDEO] = features
        expected = model(inputs_embeds=embeds).logits
        found = model(input_ids=ids, pixel_values_videos=pixels).logits
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_batch_mates_and_padding_change_nothing(make_model, raw_pixels):
    model = make_model(dtype=torch.float64)
    videos, rows = [raw_pixels(3, 1), raw_pixels(1, 2)], [prompt(3), prompt(1, before=1)]
    text_only = torch.tensor([[7, 8, 9]])
    ids, mask = left_padded([rows[0], text_only, rows[1]])
    with torch.no_grad():
        together = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values_videos=torch.cat(videos),
            num_frames=torch.tensor([3, 1]),
        )
        alone = [model(input_ids=r, pixel_values_videos=v).logits for r, v in zip(rows, videos, strict=True)]
        alone.insert(1, model(input_ids=text_only).logits)
    for row, expected in enumerate(alone):
        torch.testing.assert_close(together.logits[row, -expected.shape[1] :], expected[0], rtol=1e-10, atol=1e-10)


def test_an_image_is_a_video_of_one_frame_and_normalised_pixels_are_accepted(make_model, raw_pixels):
    model = make_model()
    raw = raw_pixels(1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.config.image_mean, model.config.image_std))
    with torch.no_grad():
        from_raw = model(input_ids=prompt(1), pixel_values_videos=raw).logits
        from_float = model(input_ids=prompt(1), pixel_values_videos=(raw / 255 - mean) / std).logits
    torch.testing.assert_close(from_float, from_raw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("items", [None, 5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_equals_that_of_full_logits(make_model, raw_pixels, items, checkpointing):
    model = make_model(dtype=torch.float64).train()
    ids, mask = left_padded([prompt(3), prompt(1)])
    labels = torch.where((mask == 1) & (ids != VIDEO), ids, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": raw_pixels(4)}
    logits = model(**batch).logits
    expected = ForCausalLMLoss(logits, labels, 272, num_items_in_batch=items)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    if checkpointing:
        model.gradient_checkpointing_enable({"segment_length": 5, "layers_per_block": 1, "use_reentrant": False})
    outputs = model(**batch, labels=labels, num_items_in_batch=items)
    assert outputs.logits is None
    assert outputs.past_key_values is None
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss.float(), expected.float(), rtol=1e-6, atol=1e-6)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trainable, "every trainable parameter needs a gradient, else DDP stops"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # transformers computes the loss in fp32
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_no_gradient(make_model, raw_pixels):
    ids, mask = left_padded([prompt(5), prompt(2)])
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": raw_pixels(7), "labels": ids}
    found = []
    for settings in (None, {}, {"method": "per_layer"}, {"segment_length": 3, "layers_per_block": 2}):
        model = make_model(dtype=torch.float64).train()
        if settings is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        model(**batch).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, found[0][name], rtol=1e-9, atol=1e-11)


def test_shifted_labels_and_logits_beside_the_loss(make_model):
    model = make_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        by_labels = model(input_ids=ids, labels=ids, logits_to_keep=2)
        shifted = torch.tensor([[6, 7, 8, -100]])
        by_shifted = model(input_ids=ids, shift_labels=shifted)
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(by_labels.loss, by_shifted.loss)
    torch.testing.assert_close(by_labels.logits, logits[:, -2:])


def test_logits_to_keep(make_model):
    model = make_model()
    ids, mask = left_padded([torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[4, 3]])])
    with torch.no_grad():
        everything = model(input_ids=ids, attention_mask=mask).logits
        for keep, expected in [
            (0, everything),
            (1, everything[:, -1:]),
            (2, everything[:, -2:]),
            (99, everything),
            (torch.tensor([3, 1]), everything[:, [3, 1]]),
        ]:
            found = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits
            torch.testing.assert_close(found, expected, msg=f"logits_to_keep={keep}")


def test_the_base_model_takes_a_whole_training_batch(make_model, raw_pixels):
    # TRL's fused loss calls the base model with every key of the batch and multiplies with the head itself
    model = make_model()
    ids = prompt(2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": raw_pixels(2)}
    with torch.no_grad():
        hidden = getattr(model, model.base_model_prefix)(**batch, labels=ids, num_frames=torch.tensor([2]))
        logits = model(**batch).logits
    torch.testing.assert_close(model.get_output_embeddings()(hidden.last_hidden_state), logits)
    assert model.config.get_text_config().vocab_size == 272


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segment_lenght": 5}, "segment_lenght"),
        ({"segment_length": 0}, "segment_length=0"),
        ({"method": "magic"}, "method='magic'"),
        ({"memory_budget": "much"}, "memory_budget"),
    ],
)
def test_wrong_checkpointing_arguments(make_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().gradient_checkpointing_enable(arguments)


def test_checkpointing_switch(make_model):
    model = make_model().train()
    ids = torch.tensor([[5, 6, 7]])
    model.gradient_checkpointing_enable({"method": "multi_axis", "offload": True, "use_reentrant": True})
    assert model.is_gradient_checkpointing
    assert model.model.recompute_vision
    assert model.model.offload_inputs
    assert not any(layer.gradient_checkpointing for layer in model.model.vision_tower.encoder.layers)
    with pytest.raises(ValueError, match="use_cache"):
        model(input_ids=ids, labels=ids, use_cache=True)
    with pytest.raises(ValueError, match="layers_per_block"):
        model._set_gradient_checkpointing(True, every_n_layers=2)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert not model.model.recompute_vision
    model(input_ids=ids, labels=ids).loss.backward()


def test_the_base_model_has_the_switch_too(make_config):
    model = VideoMa2mbaModel(make_config())
    model.gradient_checkpointing_enable({"segment_length": 4})
    assert model.language_model.gradient_checkpointing
    assert model.recompute_vision


def test_misplaced_frames_are_errors(make_model, raw_pixels):
    model = make_model()
    with pytest.raises(ValueError, match=r"holds 12 video placeholder tokens, but 2 frames make 8"):
        model(input_ids=prompt(3), pixel_values_videos=raw_pixels(2))
    with pytest.raises(ValueError, match=r"holds 12 video placeholder tokens, but 0 frames"):
        model(input_ids=prompt(3))
    with pytest.raises(ValueError, match=r"holds 0 video placeholder tokens, but 1 frames"):
        model(input_ids=torch.tensor([[1, 3]]), pixel_values_videos=raw_pixels(1))
    ids, mask = left_padded([prompt(3), prompt(1)])
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": raw_pixels(4)}
    with pytest.raises(ValueError, match="between samples"):
        model(**batch, num_frames=torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="adds up to 5"):
        model(**batch, num_frames=torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 16), pixel_values_videos=raw_pixels(1))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="NaN"):
        model(input_ids=prompt(1), pixel_values_videos=torch.full((1, 3, 16, 16), float("nan")))


def test_initial_weights(make_model):
    model = make_model(text={"num_heads": 4})
    mixer = model.model.language_model.layers[0].mixer
    assert ((mixer.A_log.exp() >= 1) & (mixer.A_log.exp() <= 16)).all()
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert ((step >= 1e-4) & (step <= 0.11)).all()
    assert torch.equal(mixer.D, torch.ones(4))
    assert model.model.multi_modal_projector.linear_1.bias.abs().sum() == 0
    assert 0.01 < model.model.multi_modal_projector.linear_1.weight.std() < 0.03
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_unused_layers_are_frozen_and_stay_in_the_checkpoint(make_model, tmp_path):
    model = make_model()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(".layers.1." in name or "post_layernorm" in name for name in frozen)
    model.requires_grad_(True)
    model.model.freeze_unused_parameters()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    model.save_pretrained(tmp_path)
    loaded = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path)
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == frozen


@pytest.mark.parametrize("tie", [True, False])
def test_saved_and_loaded(make_model, raw_pixels, tmp_path, tie):
    model = make_model(tie_word_embeddings=tie)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    batch = {"input_ids": prompt(2), "pixel_values_videos": raw_pixels(2)}
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tie
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_dynamics_in_fp32(make_model, raw_pixels, tmp_path, dtype):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    mixer = loaded.model.language_model.layers[0].mixer
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == mixer.D.dtype == torch.float32
    assert mixer.in_proj.weight.dtype == loaded.model.multi_modal_projector.linear_1.weight.dtype == dtype
    batch = {"input_ids": prompt(2), "pixel_values_videos": raw_pixels(2)}
    with torch.no_grad():
        exact, rough = model(**batch), loaded(**batch)
    assert rough.logits.dtype == dtype
    assert rough.past_key_values.ssm.dtype == torch.float32
    error = (rough.logits.float() - exact.logits).norm() / exact.logits.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("place", ["auto", "some on disk", "all on disk"])
def test_device_map(make_model, raw_pixels, tmp_path, place):
    model = make_model()
    model.save_pretrained(tmp_path)
    parts = ["vision_tower", "multi_modal_projector", "language_model.embeddings", "language_model.norm_f"]
    parts = [*(f"model.{name}" for name in parts), *(f"model.language_model.layers.{i}" for i in range(2)), "lm_head"]
    device_map = {
        "auto": "auto",
        "some on disk": {name: "disk" if "layers" in name or "vision" in name else "cpu" for name in parts},
        "all on disk": dict.fromkeys(parts, "disk"),
    }[place]
    loaded = VideoMa2mbaForConditionalGeneration.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    device = loaded.device if place == "auto" else "cpu"
    batch = {"input_ids": prompt(2).to(device), "pixel_values_videos": raw_pixels(2).to(device)}
    with torch.no_grad():
        expected = model(input_ids=prompt(2), pixel_values_videos=raw_pixels(2)).logits
        torch.testing.assert_close(loaded(**batch).logits.cpu(), expected, rtol=1e-4, atol=1e-5)
    found = loaded.generate(**batch, max_new_tokens=3)
    assert found.tolist() == model.generate(prompt(2), pixel_values_videos=raw_pixels(2), max_new_tokens=3).tolist()
    state = loaded.read(torch.tensor([[7, VIDEO]]), [[raw_pixels(2)]])
    torch.testing.assert_close(state.ssm.cpu(), model.read(torch.tensor([[7, VIDEO]]), [[raw_pixels(2)]]).ssm)


def test_resized_embeddings_stay_tied(make_model):
    model = make_model()
    model.resize_token_embeddings(280)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model(input_ids=torch.tensor([[279]])).logits.shape[-1] == 280


def test_packed_samples_do_not_see_each_other(make_model):
    model = make_model(dtype=torch.float64)
    first, second = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10, 11]])
    packed = torch.cat([first, second], dim=1)
    with torch.no_grad():
        together = model(input_ids=packed, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1]])).logits
        alone = torch.cat([model(input_ids=first).logits, model(input_ids=second).logits], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_compiled_model_gives_the_same_logits(make_model):
    model = make_model()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        compiled = torch.compile(model, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
