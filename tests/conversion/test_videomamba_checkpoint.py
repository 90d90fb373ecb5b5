"""Released VideoMamba files, synthetic ones of their exact names and shapes, into our layout and back."""

import argparse
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForVideoClassification
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.conversion.videomamba_checkpoint import convert_videomamba, read_class_names, restore_videomamba

WIDTH, LAYERS, CLASSES = 32, 2, 6


def released(kind: str = "video", frames: int = 8, tubelet: int = 1, side: int = 2) -> dict[str, torch.Tensor]:
    """Tensors under the names of the released checkpoints (facts of the original code), random."""
    torch.manual_seed(0)
    inner, rank = 2 * WIDTH, WIDTH // 16
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, side**2 + 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 16, 16) if kind == "image" else (WIDTH, 3, tubelet, 16, 16),
        "patch_embed.proj.bias": (WIDTH,),
        "head.weight": (CLASSES, WIDTH),
        "head.bias": (CLASSES,),
        "norm_f.weight": (WIDTH,),
    }
    if kind != "image":
        shapes["temporal_pos_embedding"] = (1, frames // tubelet, WIDTH)
    for i in range(LAYERS):
        start = f"layers.{i}.mixer."
        shapes |= {f"layers.{i}.norm.weight": (WIDTH,), start + "in_proj.weight": (2 * inner, WIDTH)}
        shapes |= {
            start + "out_proj.weight": (WIDTH, inner),
            start + "A_log": (inner, 16),
            start + "A_b_log": (inner, 16),
        }
        for end in ("", "_b"):
            shapes |= {start + f"D{end}": (inner,), start + f"conv1d{end}.weight": (inner, 1, 4)}
            shapes |= {start + f"conv1d{end}.bias": (inner,), start + f"x_proj{end}.weight": (rank + 32, inner)}
            shapes |= {start + f"dt_proj{end}.weight": (inner, rank), start + f"dt_proj{end}.bias": (inner,)}
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    if kind in ("masked", "multi-modal"):
        for name in ("head.weight", "head.bias"):
            del tensors[name]
        tensors["norm.weight"] = tensors.pop("norm_f.weight")
        tensors |= {"clip_decoder.0.head.weight": torch.randn(8, WIDTH), "clip_decoder.0.norm.bias": torch.randn(8)}
    if kind == "multi-modal":
        tensors["pool_norm.weight"] = torch.randn(WIDTH)
        tensors = {f"vision_encoder.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {"text_encoder.bert.x.weight": torch.randn(3, 3), "temp": torch.tensor(0.07)}
        tensors |= {"vision_proj.weight": torch.randn(4, WIDTH), "itm_head.bias": torch.randn(2)}
    return tensors


KINDS = {
    "video": lambda: {"model": released()},
    "module": lambda: {"module": released(), "epoch": 3},
    "plain": released,
    "tubelet": lambda: {"model": released(tubelet=2)},
    "image": lambda: {"model": released("image")},
    "backbone": lambda: {"model": {f"backbone.{n}": t for n, t in released().items()}},
    "masked": lambda: {"model": released("masked")},
    "multi-modal": lambda: {"module": released("multi-modal")},
    "lightning": lambda: {"state_dict": {f"backbone.{n}": t for n, t in released().items()}, "epoch": 2},
    "nested twice": lambda: {"model": {"module": released("image")}},
    "with arguments": lambda: {"model": released(), "args": argparse.Namespace(lr=1e-3), "optimizer": {"state": {}}},
    "two names of one": lambda: {"model": released() | {"layers.1.mixer.D_b": (t := torch.ones(64)),
                                                        "layers.1.mixer.D": t}},
}  # fmt: skip


def saved(tmp_path, checkpoint, name: str = "videomamba.pth") -> str:
    torch.save(checkpoint, tmp_path / name)
    return str(tmp_path / name)


def inner_tensors(checkpoint: dict) -> dict[str, torch.Tensor]:
    inside = next((checkpoint[key] for key in ("model", "module", "state_dict") if key in checkpoint), None)
    return checkpoint if inside is None else inner_tensors(inside)


@pytest.mark.parametrize("kind", KINDS)
def test_every_released_kind_converts_and_comes_back_bit_for_bit(tmp_path, kind):
    checkpoint = KINDS[kind]()
    report = convert_videomamba(saved(tmp_path, checkpoint), tmp_path / "out")
    before = inner_tensors(checkpoint)
    assert {row.name for row in report.rows} == before.keys() and "left over" not in report.counts()
    pictures = dict.fromkeys(("image", "nested twice"), AutoModelForImageClassification)
    auto = ({"masked": AutoModel, "multi-modal": AutoModel} | pictures).get(kind, AutoModelForVideoClassification)
    model, loading = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert f"({report.parameters:,})" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")  # its model card
    prefix = {"backbone": "backbone.", "lightning": "backbone.", "multi-modal": "vision_encoder."}.get(kind, "")
    for name, tensor in model.state_dict().items():
        own = name.removeprefix("videomamba.")
        stored = before.get(prefix + own, before.get(prefix + own.replace("norm_f.", "norm.")))
        assert torch.equal(tensor, stored), name
    pixels = torch.randn(1, model.config.num_frames, 3, 32, 32)
    assert torch.isfinite(model.eval()(pixels)[0]).all()
    restore_videomamba(tmp_path / "out", tmp_path / "back.pth")
    after = inner_tensors(torch.load(tmp_path / "back.pth", weights_only=True))
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("inflate", ["center", "mean"])
def test_an_image_model_becomes_a_video_model(tmp_path, inflate):
    image = released("image")
    source = saved(tmp_path, {"model": image})
    convert_videomamba(source, tmp_path / "out", num_frames=6, tubelet_size=3, inflate=inflate)
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    kernel = model.patch_embed.proj.weight
    assert model.config.num_frames == 6 and (model.temporal_pos_embedding == 0).all()
    expected = torch.zeros(WIDTH, 3, 3, 16, 16)
    if inflate == "center":
        expected[:, :, 1] = image["patch_embed.proj.weight"]
    else:
        expected[:] = image["patch_embed.proj.weight"].unsqueeze(2) / 3
    torch.testing.assert_close(kernel, expected)
    # A still picture gives the tokens of the picture.
    picture = torch.randn(1, 1, 3, 32, 32)
    tokens = model.patch_embed(picture.expand(1, 6, 3, 32, 32))
    single = F.conv2d(picture[0], image["patch_embed.proj.weight"], image["patch_embed.proj.bias"], stride=16)
    torch.testing.assert_close(tokens[0, 0], single[0].flatten(1).T, rtol=1e-4, atol=1e-4)


def test_positions_are_resized_bicubic_in_space_and_linear_in_time(tmp_path):
    before = released(frames=8, side=4)
    convert_videomamba(saved(tmp_path, {"model": before}), tmp_path / "out", num_frames=16, image_size=96)
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "out").videomamba
    grid = before["pos_embed"][:, 1:].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(model.pos_embed, torch.cat([before["pos_embed"][:, :1], grid], 1))
    time = F.interpolate(before["temporal_pos_embedding"].transpose(1, 2), size=16, mode="linear").transpose(1, 2)
    torch.testing.assert_close(model.temporal_pos_embedding, time)
    assert model.config.num_frames == 16 and model.config.image_size == 96


def test_the_command_converts_names_classes_and_goes_back(tmp_path):
    source = saved(tmp_path, {"model": released()})
    (tmp_path / "labels.txt").write_text("\n".join(f"doing {i}" for i in range(CLASSES)))
    arguments = ["convert", source, "--out", str(tmp_path / "out"), "--labels", str(tmp_path / "labels.txt")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["id2label"]["3"] == "doing 3"
    assert (tmp_path / "out" / "video_preprocessor_config.json").is_file()
    back = ["convert", str(tmp_path / "out"), "--to", "official", "--out", str(tmp_path / "again.pth")]
    result = CliRunner().invoke(app, back)
    assert result.exit_code == 0, result.output
    after = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert all(torch.equal(after[name], tensor) for name, tensor in released().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.mixer.A_b_log"), "1 missing: layers.1.mixer.A_b_log"),
        (lambda t: t.update({"surprise.weight": torch.zeros(1)}), "1 unknown: surprise.weight"),
        (lambda t: t.update({"layers.1.mixer.D": torch.zeros(3)}), r"1 mis-shaped: layers.1.mixer.D is \[3\]"),
        (lambda t: t.update({"pos_embed": torch.zeros(1, 7, WIDTH)}), "pos_embed: not one position more"),
        (lambda t: t.clear() or t.update({"x": torch.zeros(1)}), "no VideoMamba checkpoint"),
        (lambda t: t.update({"norm.weight": t["norm_f.weight"]}), "1 there twice: norm.weight, beside norm_f.weight"),
    ],
    ids=["missing", "unknown", "mis-shaped", "positions", "other", "twice"],
)
def test_damaged_files_are_refused_with_names(tmp_path, change, message):
    tensors = released()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        convert_videomamba(saved(tmp_path, {"model": tensors}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_had_are_named_with_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "OpenGVLab/VideoMamba/videomamba_t16_k400_f8_res224.pth"
    result = CliRunner().invoke(app, ["convert", name, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    url = "https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/videomamba_t16_k400_f8_res224.pth"
    assert url in result.stderr and len(result.stderr.strip().splitlines()) == 1
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert_videomamba("./nothing.pth", tmp_path / "out")
    (tmp_path / "two.txt").write_text("a\nb\n")
    source = saved(tmp_path, {"model": released()})
    with pytest.raises(ValueError, match="names 2 classes, the head of"):
        convert_videomamba(source, tmp_path / "out", labels=tmp_path / "two.txt")


def test_files_of_old_pytorch_are_read(tmp_path):
    torch.save({"model": released()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    report = convert_videomamba(str(tmp_path / "old.pth"), tmp_path / "out", dry_run=True)
    assert len(report.rows) == len(released())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 10}, "patch_size=16 is not valid: it must divide image_size=10"),
        ({"num_frames": 7, "tubelet_size": 2}, "--tubelet 2 is for a model of pictures"),
        ({"inflate": "max"}, "use 'center' or 'mean'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        convert_videomamba(saved(tmp_path, {"model": released()}), tmp_path / "out", **sizes)
    assert not (tmp_path / "out").exists()


def test_a_head_with_one_output_predicts_a_value(tmp_path):
    one = {name: tensor[:1] if name.startswith("head.") else tensor for name, tensor in released().items()}
    convert_videomamba(saved(tmp_path, {"model": one}), tmp_path / "out")
    assert AutoModelForVideoClassification.from_pretrained(tmp_path / "out").config.problem_type == "regression"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", b"\xef\xbb\xbfa b\r\n\r\nc\r\n"),
        ("names.txt", "a b\nc\n".encode("utf-16")),
        ("list.json", b'["a b", "c"]'),
        ("numbers.json", b'{"1": "c", "0": "a b"}'),
        ("ssv2.json", b'{"c": "1", "a b": "0"}'),
        ("ids.JSON", b'{"c": 1, "a b": 0}'),
    ],
)
def test_names_of_classes_are_read_as_they_are_published(tmp_path, name, text):
    (tmp_path / name).write_bytes(text)
    assert read_class_names(tmp_path / name) == ["a b", "c"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n.txt", "caf\xe9".encode("latin1"), "n.txt: the byte 0xe9 is not UTF-8"),
        ("n.json", b'["a"', "n.json: this is not JSON"),
        ("n.json", b"3", "n.json must be a list of names, or"),
        ("n.json", b'{"0": "a", "2": "b"}', "with every number once"),
        ("n.json", b'{"a": 0, "b": 0}', "with every number once"),
        ("n.json", b'[["a"], "b"]', "must be a list of names"),
    ],
)
def test_names_that_are_none_are_refused_with_the_file(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_class_names(tmp_path / name)


def test_the_command_says_what_has_which_layout(tmp_path):
    source, out = saved(tmp_path, {"model": released()}), str(tmp_path / "out")
    convert_videomamba(source, tmp_path / "ours")
    for arguments, said in (
        ([source, "--to", "official", "--out", f"{out}.pth"], "has the official layout already"),
        ([str(tmp_path / "ours"), "--out", out], "back goes --to official --out FILE.pth"),
        ([str(tmp_path / "ours"), "--to", "official", "--out", out], "back goes --to official --out FILE.pth"),
    ):
        result = CliRunner().invoke(app, ["convert", *arguments])
        assert result.exit_code == 2 and said in result.stderr and len(result.stderr.strip().splitlines()) == 1
