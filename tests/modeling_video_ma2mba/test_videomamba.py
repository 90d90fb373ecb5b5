"""VideoMamba against the paper's equations, its published sizes, and what its structure implies."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForVideoClassification

from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from video_ma2mba.modeling_video_ma2mba.configuration_videomamba_sizes import SCAN_ORDERS
from video_ma2mba.modeling_video_ma2mba.mixer_mamba1 import VideoMambaMixer
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba import (
    VideoMambaForVideoClassification,
    drop_path,
    drop_path_rates,
    parameter_groups,
    temporal_order,
)
from video_ma2mba.modeling_video_ma2mba.ops_selective_scan import selective_scan

sys.path.insert(0, str(Path(__file__).parent))
import videomamba_by_the_equations as equations

SMALL = dict(hidden_size=24, num_hidden_layers=3, state_size=4, image_size=32, num_frames=4, num_labels=5)


def small_model(seed: int = 0, **changes) -> VideoMambaForVideoClassification:
    """A model whose every tensor matters: what starts at a constant is made random."""
    torch.manual_seed(seed)
    model = VideoMambaForVideoClassification(VideoMambaConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_log"):
                parameter.copy_(torch.rand_like(parameter) * 2)
            elif "norm" in name or name.split(".")[-1] in ("D", "D_b", "D_t", "D_t_b"):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif "dt_proj" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def released_names(model) -> dict[str, torch.Tensor]:
    return {n.removeprefix("videomamba."): p.detach().double() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tubelet_size": 2},
        {"tubelet_size": None},
        {"scan_order": "temporal_first"},
        {"scan_order": "spatiotemporal_v1"},
        {"scan_order": "alternating"},
        {"residual_in_fp32": False},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "default",
)
def test_logits_and_gradients_equal_the_equations(changes):
    model = small_model(**changes)
    orders = {
        "temporal_first": lambda layer: ("temporal", "temporal"),
        "spatiotemporal_v1": lambda layer: ("spatial", "temporal"),
        "alternating": lambda layer: (("spatial", "temporal")[layer % 2],) * 2,
    }.get(model.config.scan_order)
    clip = torch.randn(1, model.config.num_frames, 3, 32, 32)
    tensors = {name: value.requires_grad_() for name, value in released_names(model).items()}
    expected = equations.logits(clip[0].double(), tensors, orders)
    direction = torch.randn(5).double()
    (expected @ direction).backward()

    logits = model(clip).logits[0]
    assert (logits.double() - expected).abs().max() <= 1e-5 * max(1.0, float(expected.detach().abs().max()))
    (logits @ direction.float()).backward()
    for name, parameter in model.named_parameters():
        wanted = tensors[name.removeprefix("videomamba.")].grad
        error = (parameter.grad.double() - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert error <= 1e-4 or wanted.norm() < 1e-10, (name, float(error))


def test_the_scan_in_fp64_equals_one_token_at_a_time_with_states_and_gradients():
    torch.manual_seed(0)
    directions, batch, tokens, channels, state = 2, 2, 53, 6, 4  # not a multiple of the chunk
    u, dt = torch.randn(2, directions, batch, tokens, channels, dtype=torch.float64)
    b, c = torch.randn(2, directions, batch, tokens, state, dtype=torch.float64)
    a = -torch.rand(directions, channels, state, dtype=torch.float64) * 16
    d, bias = torch.randn(2, directions, channels, dtype=torch.float64)
    z = torch.randn(batch, tokens, channels, dtype=torch.float64)
    start = torch.randn(directions, batch, channels, state, dtype=torch.float64)
    given = [t.requires_grad_() for t in (u, dt, a, b, c, d, bias, z, start)]

    def step_by_step(u, dt, a, b, c, d, bias, z, start):
        ys, ends = [], []
        for k, order in enumerate((range(tokens), reversed(range(tokens)))):
            h, y = start[k], [None] * tokens
            for t in order:
                step = F.softplus(dt[k, :, t] + bias[k])
                h = torch.exp(step[..., None] * a[k]) * h + (step * u[k, :, t])[..., None] * b[k, :, t, None]
                y[t] = ((h * c[k, :, t, None]).sum(-1) + d[k] * u[k, :, t]) * F.silu(z[:, t])
            ys.append(torch.stack(y, dim=1))
            ends.append(h)
        return torch.stack(ys), torch.stack(ends)

    expected = step_by_step(*given)
    found = selective_scan(*given, reverse=(False, True))
    weights = [torch.randn_like(t) for t in expected]
    wanted = torch.autograd.grad(sum((t * w).sum() for t, w in zip(expected, weights, strict=True)), given)
    grads = torch.autograd.grad(sum((t * w).sum() for t, w in zip(found, weights, strict=True)), given)
    for one, other in zip((*expected, *wanted), (*found, *grads), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


def test_a_scan_cut_in_two_is_the_scan():
    torch.manual_seed(0)
    u, dt = torch.randn(2, 1, 1, 2100, 3)  # more than two groups
    b, c = torch.randn(2, 1, 1, 2100, 4)
    a, d, bias = -torch.rand(1, 3, 4), torch.randn(1, 3), torch.randn(1, 3)
    whole, end = selective_scan(u, dt, a, b, c, d, bias)
    first, state = selective_scan(u[:, :, :700], dt[:, :, :700], a, b[:, :, :700], c[:, :, :700], d, bias)
    rest = [t[:, :, 700:] for t in (u, dt, b, c)]
    second, last = selective_scan(rest[0], rest[1], a, rest[2], rest[3], d, bias, initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "labels", "changes", "count"),
    [
        ("ti", 400, {}, 7_033_744),
        ("s", 400, {}, 25_568_656),
        ("m", 400, {}, 73_875_856),
        ("ti", 1000, {"tubelet_size": None}, 7_148_008),
        ("s", 1000, {"tubelet_size": None}, 25_796_584),
        ("m", 1000, {"tubelet_size": None}, 74_217_448),
        ("b", 1000, {"tubelet_size": None}, 97_598_440),
    ],
)
def test_parameter_counts_are_the_published_ones(size, labels, changes, count):
    with torch.device("meta"):
        model = VideoMambaForVideoClassification(VideoMambaConfig.preset(size, num_labels=labels, **changes))
    assert sum(p.numel() for p in model.parameters()) == count


def test_swapped_directions_on_flipped_tokens_give_the_flipped_output():
    config = VideoMambaConfig(**SMALL)
    torch.manual_seed(0)
    mixer = VideoMambaMixer(config, 0).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    other = VideoMambaMixer(config, 0).double()
    swap = {"A_log": "A_b_log", "D": "D_b", "conv1d": "conv1d_b", "x_proj": "x_proj_b", "dt_proj": "dt_proj_b"}
    swap |= {value: key for key, value in swap.items()}
    own = mixer.state_dict()
    renamed = {
        name: ".".join([swap.get(name.split(".")[0], name.split(".")[0]), *name.split(".")[1:]]) for name in own
    }
    other.load_state_dict({renamed[name]: value for name, value in own.items()})
    hidden = torch.randn(2, 37, config.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(other(hidden.flip(1)), mixer(hidden).flip(1), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(mixer(hidden.flip(1)), mixer(hidden).flip(1))


def test_the_last_forward_scan_reaches_the_class_token_without_its_decay():
    model = small_model()
    model(torch.randn(2, 4, 3, 32, 32)).logits.square().sum().backward()
    mixers = [block.mixer for block in model.videomamba.layers]
    assert mixers[-1].A_log.grad.abs().max() == 0  # the class token comes first: nothing decays before it
    assert mixers[-1].A_b_log.grad.abs().max() > 0 and mixers[-2].A_log.grad.abs().max() > 0


def test_orders_are_permutations_undone_exactly_and_the_class_token_stays_first():
    order, inverse = temporal_order(3, 4)
    assert order.tolist() == [0, 1, 5, 9, 2, 6, 10, 3, 7, 11, 4, 8, 12]
    assert torch.equal(order[inverse], torch.arange(13)) and torch.equal(inverse[order], torch.arange(13))
    for shape in ((5, 1), (1, 5)):
        assert torch.equal(temporal_order(*shape)[0], torch.arange(6))


@pytest.mark.parametrize("scan_order", SCAN_ORDERS)
def test_orders_agree_where_there_is_one_place_or_one_frame(scan_order):
    """With one frame, the temporal order is the spatial one; only the four-scan form adds each scan twice."""
    plain = small_model(num_frames=1)
    other = VideoMambaForVideoClassification(VideoMambaConfig(**{**SMALL, "num_frames": 1}, scan_order=scan_order))
    other.load_state_dict(plain.state_dict())
    clip = torch.randn(2, 1, 3, 32, 32)
    same = torch.allclose(other.eval()(clip).logits, plain(clip).logits, rtol=1e-5, atol=1e-6)
    assert same == (scan_order != "spatiotemporal_v2")
    mixer, twice = (m.videomamba.layers[0].mixer for m in (plain, other))
    if scan_order == "spatiotemporal_v2":
        hidden = torch.randn(1, 5, 24)
        order = torch.arange(5)
        torch.testing.assert_close(twice(hidden, order, order), 2 * mixer(hidden), rtol=1e-4, atol=1e-5)


def test_scan_orders_differ_and_half_orders_change_in_the_middle():
    clip = torch.randn(1, 4, 3, 32, 32)
    plain = small_model(num_hidden_layers=4)
    logits = {}
    for order in SCAN_ORDERS:
        model = VideoMambaForVideoClassification(
            VideoMambaConfig(**{**SMALL, "num_hidden_layers": 4}, scan_order=order)
        )
        model.load_state_dict(plain.state_dict())
        logits[order] = model.eval()(clip).logits
        used = ["/".join(dict.fromkeys(p.order[0] for p in b.mixer.passes)) for b in model.videomamba.layers]
        assert (
            used
            == {
                "spatial_first": ["s"] * 4,
                "temporal_first": ["t"] * 4,
                "spatiotemporal_v1": ["s/t"] * 4,
                "spatiotemporal_v2": ["s/t"] * 4,
                "spatial_then_temporal": ["s", "s", "t", "t"],
                "temporal_then_spatial": ["t", "t", "s", "s"],
                "alternating": ["s", "t", "s", "t"],
            }[order]
        )
    values = list(logits.values())
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(values) for b in values[:i])
    own = VideoMambaForVideoClassification(
        VideoMambaConfig(**SMALL, scan_order="spatiotemporal_v2", share_scan_weights=False)
    )
    names = {n.split(".")[-1] for n, _ in own.videomamba.layers[0].mixer.named_parameters() if n.endswith("_log")}
    assert names == {"A_log", "A_b_log", "A_t_log", "A_t_b_log"}
    assert torch.isfinite(own.eval()(clip).logits).all()


def test_drop_path_acts_on_whole_samples_at_rates_that_grow_with_depth():
    config = VideoMambaConfig(**{**SMALL, "num_hidden_layers": 5}, drop_path_rate=0.4)
    assert drop_path_rates(config) == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3, 0.4])
    torch.manual_seed(0)
    delta = torch.ones(4000, 2, 3)
    dropped = drop_path(delta, 0.4, training=True)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert (dropped[:, :1, :1] == dropped).all()
    assert float((dropped[:, 0, 0] == 0).float().mean()) == pytest.approx(0.4, abs=0.03)
    assert drop_path(delta, 0.4, training=False) is delta
    # In a model: block i drops what block i - 1 added, the first drops nothing, the closing addition the full rate.
    model = VideoMambaForVideoClassification(config).train()
    assert [block.drop_path_rate for block in model.videomamba.layers] == drop_path_rates(config)[:5]


def test_the_residual_stream_of_a_16_bit_model_is_fp32():
    model = small_model().bfloat16()
    tokens = model.videomamba.embed(torch.randn(1, 4, 3, 32, 32))
    residual, delta = model.videomamba.run_blocks(tokens)
    assert tokens.dtype == delta.dtype == torch.bfloat16 and residual.dtype == torch.float32
    model = small_model(residual_in_fp32=False).bfloat16()
    assert model.videomamba.run_blocks(tokens)[0].dtype == torch.bfloat16


def test_initialisation_is_that_of_the_released_models():
    torch.manual_seed(0)
    config = VideoMambaConfig(hidden_size=192, num_hidden_layers=4, num_frames=8, num_labels=10)
    model = VideoMambaForVideoClassification(config)
    base, mixer = model.videomamba, model.videomamba.layers[1].mixer
    for rates in (mixer.A_log, mixer.A_b_log):
        torch.testing.assert_close(rates.exp(), torch.arange(1.0, 17).expand(384, 16))
    assert (mixer.D == 1).all() and (mixer.D_b == 1).all()
    for bias in (
        mixer.dt_proj.bias,
        mixer.dt_proj_b.bias,
        model.head.bias,
        base.cls_token,
        base.temporal_pos_embedding,
    ):
        assert (bias == 0).all()
    for weight in (
        mixer.in_proj.weight,
        mixer.x_proj_b.weight,
        mixer.dt_proj.weight,
        model.head.weight,
        base.pos_embed,
    ):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(mixer.out_proj.weight.detach().std()) == pytest.approx(
        (384 * 4 * 3) ** -0.5, rel=0.02
    )  # uniform, over sqrt(4)
    assert float(mixer.conv1d.weight.detach().std()) == pytest.approx(0.5 / 3**0.5, rel=0.1)
    assert (base.norm_f.weight == 1).all()


def test_weight_decay_spares_vectors_biases_positions_and_the_class_token_but_not_the_decay_rates():
    model = small_model()
    decayed, plain = parameter_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ({names[id(p)].removeprefix("videomamba.") for p in g["params"]} for g in (decayed, plain))
    assert {"layers.0.mixer.A_log", "layers.0.mixer.A_b_log", "layers.0.mixer.conv1d.weight", "head.weight"} <= decayed
    assert {"pos_embed", "cls_token", "temporal_pos_embedding", "layers.0.mixer.D", "norm_f.weight"} <= plain
    assert {"layers.0.mixer.dt_proj.bias", "patch_embed.proj.bias", "layers.2.norm.weight"} <= plain
    assert len(decayed) + len(plain) == len(names)


def test_checkpointing_keeps_the_gradients():
    clip, labels = torch.randn(2, 4, 3, 32, 32), torch.tensor([0, 3])
    gradients = []
    for checkpointing in (False, True):
        model = small_model(drop_path_rate=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(clip, labels=labels).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tubelet_size", [1, None], ids=["video", "image"])
def test_a_saved_model_comes_back_bit_for_bit_through_the_auto_classes(tmp_path, tubelet_size):
    model = small_model(tubelet_size=tubelet_size, id2label={i: f"class {i}" for i in range(5)})
    model.save_pretrained(tmp_path)
    auto = AutoModelForVideoClassification if tubelet_size else AutoModelForImageClassification
    again = auto.from_pretrained(tmp_path)
    for (name, one), (other_name, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other), name
    assert again.config.id2label == model.config.id2label
    clip = torch.randn(1, model.config.num_frames, 3, 32, 32)
    torch.testing.assert_close(again.eval()(clip).logits, model(clip).logits, rtol=1e-5, atol=1e-6)
    assert AutoConfig.from_pretrained(tmp_path).scan_order == "spatial_first"
    base = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(base(clip).pooler_output, model.videomamba(clip).pooler_output, rtol=1e-5, atol=1e-6)


def test_raw_pixels_are_normalised_by_the_model():
    model = small_model()
    raw = torch.randint(0, 256, (1, 4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.config.image_mean, model.config.image_std))
    torch.testing.assert_close(model(raw).logits, model((raw / 255 - mean) / std).logits, rtol=1e-4, atol=1e-5)


def test_views_are_averaged_as_probabilities():
    model = small_model()
    views = torch.randn(2, 3, 4, 3, 32, 32)
    single = torch.stack([model(views[:, i]).logits.softmax(-1) for i in range(3)], 1)
    torch.testing.assert_close(model(views).logits.softmax(-1), single.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(views[:, :1]).logits, model(views[:, 0]).logits)
    model.config.problem_type = "regression"
    torch.testing.assert_close(
        model(views).logits,
        torch.stack([model(views[:, i]).logits for i in range(3)], 1).mean(1),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 6, 3, 32, 32), "a clip of 6 frames was given, this model takes 4"),
        (torch.zeros(1, 4, 3, 48, 32), "frames of 48 x 32 pixels were given, this model takes 32 x 32"),
        (torch.zeros(1, 4, 1, 32, 32), "pixel_values must have the shape"),
        (torch.zeros(4, 3, 32, 32), "pixel_values must have the shape"),
        (torch.zeros(1, 4, 3, 32, 32, dtype=torch.int32), "must be uint8"),
    ],
    ids=["frames", "size", "channels", "no batch", "integers"],
)
def test_clips_of_another_shape_are_refused_in_one_line(pixels, message):
    with pytest.raises(ValueError, match=message) as refused:
        small_model()(pixels)
    assert "\n" not in str(refused.value)


def test_labels_of_any_whole_numbers_and_shares_of_classes_give_the_same_loss():
    model, clips = small_model(), torch.randn(2, 4, 3, 32, 32)
    wanted = torch.nn.functional.cross_entropy(model(clips).logits, torch.tensor([3, 0]))
    for labels in (torch.tensor([3, 0], dtype=torch.int32), torch.eye(5)[[3, 0]], torch.eye(5).double()[[3, 0]]):
        assert torch.equal(model(clips, labels=labels).loss, wanted)


def test_hidden_states_are_the_stream_before_and_after_each_block():
    model, clips = small_model(), torch.randn(2, 4, 3, 32, 32)
    found = model(clips, output_hidden_states=True)
    encoder = model.videomamba
    assert len(found.hidden_states) == 4 and torch.equal(found.hidden_states[0], encoder.embed(clips))
    for layers, stream in enumerate(found.hidden_states[1:], 1):
        residual, delta = encoder.run_blocks(encoder.embed(clips), layers)
        torch.testing.assert_close(stream, residual + delta)
    last = encoder(clips).last_hidden_state
    assert torch.equal(encoder.norm_f(found.hidden_states[-1]), last) and encoder(clips).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(clips).hidden_states) == 4


def test_wrong_classes_and_settings_are_refused_in_one_line():
    with pytest.raises(ValueError, match="labels go from 5 to 5, the model has 5 classes"):
        small_model()(torch.zeros(1, 4, 3, 32, 32), labels=torch.tensor([5]))
    for labels in (torch.tensor([1.0]), torch.tensor([1, 2]), torch.tensor([[1]]), torch.ones(1, 4)):
        with pytest.raises(ValueError, match="labels must be 1 classes, as whole numbers"):
            small_model()(torch.zeros(1, 4, 3, 32, 32), labels=labels)
    assert VideoMambaConfig.preset("Ti").hidden_size == VideoMambaConfig.preset("ti").hidden_size
    wrong = {"scan_order": "zigzag", "tubelet_size": 3, "patch_size": 15, "hidden_size": 0, "num_hidden_layers": -1}
    for field, value in (wrong | {"initializer_range": -1, "problem_type": "x"}).items():
        with pytest.raises(ValueError, match=f"{field}={value!r} is not valid"):
            VideoMambaConfig(**{**SMALL, field: value})
    with pytest.raises(ValueError, match="there is no VideoMamba of the size 'xl'"):
        VideoMambaConfig.preset("xl")


def test_a_checkpoint_of_another_size_or_with_other_classes_is_refused_in_a_line(tmp_path):
    sizes = {"num_hidden_layers": 1, "image_size": 32, "num_frames": 2}
    VideoMambaForVideoClassification(VideoMambaConfig(hidden_size=16, num_labels=3, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its head has 3 classes, not 5: ignore_mismatched_sizes=True"):
        AutoModelForVideoClassification.from_pretrained(tmp_path, num_labels=5)
    fresh = AutoModelForVideoClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert fresh.head.weight.shape == (5, 16)
    VideoMambaConfig(hidden_size=32, num_labels=3, **sizes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of another size than its configuration: .* is .*16.*, not .*32") as error:
        AutoModelForVideoClassification.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_only_steps_of_mamba_let_a_fresh_class_token_see_the_whole_clip():
    """It stands before the first frame. The released start, a step of 0.69, forgets within a few tokens."""
    clip = torch.randn(1, 8, 3, 64, 64)
    for steps, sees in ((None, False), ((0.001, 0.1), True)):
        torch.manual_seed(0)
        config = VideoMambaConfig(
            hidden_size=32, num_hidden_layers=2, image_size=64, patch_size=8, time_step_range=steps
        )
        model = VideoMambaForVideoClassification(config).videomamba
        if steps:
            mixer = model.layers[1].mixer
            for bias in (mixer.dt_proj.bias, mixer.dt_proj_b.bias):
                found = torch.nn.functional.softplus(bias.detach()).sort().values
                even = torch.logspace(-3, -1, len(found))  # log-uniform
                assert found[0] > 0.00099 and found[-1] < 0.101
                assert (found.log() - even.log()).abs().max() < 1.2
        given = clip.clone().requires_grad_()
        model(given).pooler_output.square().sum().backward()
        by_frame = given.grad.square().sum(dim=(0, 2, 3, 4)).sqrt()
        assert bool(by_frame[-1] > 1e-9 * by_frame[0]) == sees
    with pytest.raises(ValueError, match="time_step_range"):
        VideoMambaConfig(time_step_range=(0.1, 0.001))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["ti", "s", "m"])
def test_full_size_clips_run_on_a_cpu(size):
    torch.manual_seed(0)
    frames = 8 if size == "ti" else 2  # the wider ones take seconds a frame
    config = VideoMambaConfig.preset(size, num_labels=400, num_frames=frames)
    model = VideoMambaForVideoClassification(config).eval()
    with torch.no_grad():
        logits = model(torch.randint(0, 256, (1, frames, 3, 224, 224), dtype=torch.uint8)).logits
    assert logits.shape == (1, 400) and torch.isfinite(logits).all() and logits.std() > 0
