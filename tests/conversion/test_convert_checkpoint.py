"""Conversion: the converted model computes the same numbers, and whatever does not fit is refused by name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conversion_models import (
    CONFIG,
    LAYERS,
    NESTINGS,
    ROWS,
    TOWER,
    WIDTH,
    clip_tower,
    language_model,
    official_tensors,
    projector,
)
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    pipeline,
)

from video_ma2mba.conversion.convert_checkpoint import convert_checkpoint
from video_ma2mba.conversion.report import ConversionError
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer, byte_alphabet

IDS = torch.randint(6, 262, (1, 20), generator=torch.Generator().manual_seed(3))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def load(folder: Path):
    """The converted model; every tensor of it came from the file."""
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
    return found


def assert_same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[key].dtype, other[key].shape), key
        assert torch.equal(tensor.contiguous().view(torch.uint8), other[key].contiguous().view(torch.uint8)), key


def reference_rows(tower, mlp) -> Tensor:
    """Penultimate patch tokens, 2x2 bilinear, projector: with transformers' tower alone."""
    with torch.no_grad():
        hidden = tower(PIXELS, output_hidden_states=True).hidden_states[-2][:, 1:]
        grid = hidden.transpose(1, 2).reshape(len(PIXELS), TOWER["hidden_size"], 4, 4)
        pooled = F.interpolate(grid, size=(2, 2), mode="bilinear").flatten(2).transpose(1, 2)
        return mlp(pooled).flatten(0, 1)


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_answers_are_those_of_the_parts(tmp_path: Path, checkpoint, nesting: str, shards: int):
    language, tower, mlp = language_model(), clip_tower(), projector()
    source = checkpoint(official_tensors(language, tower, mlp, nesting), shards=shards)
    report = convert_checkpoint(source, tmp_path / "out")
    model = load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, language(IDS).logits, rtol=1e-4, atol=1e-4)
        rows = model.model.get_video_features(PIXELS)
        torch.testing.assert_close(rows, reference_rows(tower, mlp), rtol=1e-4, atol=1e-5)
        video = torch.full((1, 8), model.config.video_token_id)
        seen = language(inputs_embeds=torch.cat([rows[None], language.get_input_embeddings()(IDS)], dim=1)).logits
        whole = model(input_ids=torch.cat([video, IDS], dim=1), pixel_values_videos=PIXELS).logits
        torch.testing.assert_close(whole, seen, rtol=1e-4, atol=1e-4)
    assert report.counts()["tied"] == 1
    assert model.config.tie_word_embeddings


def test_an_output_layer_of_its_own_stays_so(tmp_path: Path, checkpoint):
    language = language_model(tie=False)
    source = checkpoint(official_tensors(language, clip_tower(), projector()))
    assert "tied" not in convert_checkpoint(source, tmp_path / "out").counts()
    model = load(tmp_path / "out")
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, language(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["duplicated head", "untied", "no head", "bf16", "positions", "several files"])
def test_round_trip_is_byte_identical(tmp_path: Path, checkpoint, variant: str):
    tensors = official_tensors(language_model(variant != "untied"), clip_tower(), projector())
    if variant == "no head":
        del tensors["lm_head.weight"]
    if variant == "bf16":
        tensors = {k: v if "A_log" in k else v.to(torch.bfloat16) for k, v in tensors.items()}
    if variant == "positions":
        tensors["mm_model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    source = checkpoint(tensors, shards=3 if variant == "several files" else 1)
    limit = 20_000 if variant == "several files" else 5_000_000_000
    convert_checkpoint(source, tmp_path / "ours", max_shard_bytes=limit)
    model = load(tmp_path / "ours")
    assert model.dtype == (torch.bfloat16 if variant == "bf16" else torch.float32)
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="official", max_shard_bytes=limit)
    assert_same_bytes(stored(source), stored(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == CONFIG
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) == (1 if limit > 20_000 else pytest.approx(6, abs=3))


def test_a_model_made_here_goes_to_the_official_layout_and_returns(tmp_path: Path, tiny_checkpoint: Path):
    convert_checkpoint(tiny_checkpoint, tmp_path / "official", to="official")
    names = stored(tmp_path / "official").keys()
    assert {"backbone.embedding.weight", "lm_head.weight", "mm_model.mm_projector.2.bias"} <= names
    convert_checkpoint(tmp_path / "official", tmp_path / "ours")
    assert_same_bytes(stored(tiny_checkpoint), stored(tmp_path / "ours"))
    before, after = (json.loads((f / "config.json").read_text()) for f in (tiny_checkpoint, tmp_path / "ours"))
    for field in ("vision_feature_layer", "spatial_pool_stride", "video_token_id", "image_mean"):
        assert before[field] == after[field], field
    for part, fields in (
        ("text_config", ("head_dim", "state_size", "chunk_size", "num_heads", "time_step_limit")),
        ("vision_config", ("num_attention_heads", "image_size", "patch_size", "hidden_act")),
    ):
        assert {k: before[part][k] for k in fields} == {k: after[part][k] for k in fields}


def test_the_result_answers_a_video(tmp_path: Path, checkpoint, tensors, tiny_video: Path):
    convert_checkpoint(checkpoint(tensors), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.convert_ids_to_tokens([processor.tokenizer.pad_token_id]) == ["<pad>"]
    pipe = pipeline("video-question-answering", model=str(tmp_path / "out"), trust_remote_code=True)
    assert isinstance(pipe(str(tiny_video), "Brighter?", max_new_tokens=3)[0]["answer"], str)


def problems(source: Path, out: Path, **arguments) -> dict[str, list[str]]:
    """Lists of a refusal, which writes nothing."""
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(source, out, **arguments)
    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()
    return caught.value.problems


def test_every_missing_tensor_is_refused_by_name(tmp_path: Path, checkpoint, tensors):
    gone = [
        "backbone.layers.1.mixer.in_proj.weight",
        "backbone.norm_f.weight",
        "mm_model.mm_projector.2.bias",
        "mm_model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
    ]
    for name in gone:
        del tensors[name]
    assert {k: sorted(v) for k, v in problems(checkpoint(tensors), tmp_path / "out").items()} == {"missing": gone}


@pytest.mark.parametrize("part", ["backbone.", "mm_model.vision_tower.", "mm_model.mm_projector."])
def test_a_missing_part_is_refused(tmp_path: Path, checkpoint, tensors, part: str):
    rest = {key: value for key, value in tensors.items() if not key.startswith(part)}
    assert list(problems(checkpoint(rest), tmp_path / "out")) == ["missing"]


@pytest.mark.parametrize(
    "layer", [f"backbone.layers.{LAYERS - 1}.", "mm_model.vision_tower.vision_tower.vision_model.encoder.layers.2."]
)
def test_a_lost_last_layer_contradicts_the_configuration(tmp_path: Path, checkpoint, tensors, layer: str):
    rest = {key: value for key, value in tensors.items() if not key.startswith(layer)}
    config = CONFIG | {"vision_config": {"num_attention_heads": 2, "num_hidden_layers": 3}}
    assert "contradicting" in problems(checkpoint(rest, config), tmp_path / "out")


def test_unknown_tensors_are_refused_unless_left_out(tmp_path: Path, checkpoint, tensors):
    extra = ["mm_model.image_newline", "backbone.layers.0.mlp.fc1.weight", "mm_model.vision_tower.gate"]
    source = checkpoint(tensors | {name: torch.ones(2) for name in extra})
    assert {k: sorted(v) for k, v in problems(source, tmp_path / "out").items()} == {"unknown": sorted(extra)}
    patterns = ["mm_model.image_*", "*.mlp.fc1.weight", "*.gate"]
    with pytest.raises(ConversionError):
        convert_checkpoint(source, tmp_path / "out", leave_out=[patterns[0]])
    # The tower's own mlp.fc1.weight must not fall to a pattern that is too wide: then it is missing.
    with pytest.raises(ConversionError, match="missing"):
        convert_checkpoint(source, tmp_path / "out", leave_out=patterns)
    patterns[1] = "backbone.*.mlp.fc1.weight"
    report = convert_checkpoint(source, tmp_path / "out", leave_out=patterns)
    assert sorted(row.name for row in report.rows if row.action == "left over") == sorted(extra)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.layers.0.mixer.in_proj.weight",
        "backbone.layers.0.mixer.A_log",
        "backbone.norm_f.weight",
        "lm_head.weight",
        "mm_model.mm_projector.0.weight",
        "mm_model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    ],
)
def test_wrong_shapes_are_refused_by_name(tmp_path: Path, checkpoint, tensors, name: str):
    tensors[name] = tensors[name][:-1].clone()
    found = problems(checkpoint(tensors), tmp_path / "out")
    assert [item.split(" is ")[0] for item in found["mis-shaped"]] == [name]


def test_numbers_of_another_kind_are_refused_by_name(tmp_path: Path, checkpoint, tensors):
    tensors["backbone.norm_f.weight"] = torch.ones(WIDTH, dtype=torch.int64)
    found = problems(checkpoint(tensors), tmp_path / "out")
    assert found == {"mistyped": ["backbone.norm_f.weight is I64, not floating point"]}


def test_a_damaged_configuration_is_named(tmp_path: Path, checkpoint, tensors):
    source = checkpoint(tensors)
    (source / "config.json").write_text("{half a")
    with pytest.raises(ValueError, match=r"config\.json of .*source0 is damaged"):
        convert_checkpoint(source, tmp_path / "out")


def test_what_cannot_be_fetched_is_named(tmp_path: Path):
    with pytest.raises(OSError, match=r"somebody/model cannot be fetched from the Hub: .* `hf auth login`"):
        convert_checkpoint("somebody/model", tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 32}, "hidden_size is 16 by the tensors, 32"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode='max'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type"),
        ({"vision_config": {}}, "attention heads"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path: Path, checkpoint, tensors, fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(checkpoint(tensors, CONFIG | fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configuration_says_what_shapes_cannot(tmp_path: Path, checkpoint, tensors):
    fields = {"mm_vision_select_layer": -1, "mm_spatial_pool_stride": 4, "mm_spatial_pool_mode": "average"}
    source = checkpoint(tensors, CONFIG | fields)
    (source / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    convert_checkpoint(source, tmp_path / "out")
    config = load(tmp_path / "out").config
    assert (config.vision_feature_layer, config.spatial_pool_stride, config.spatial_pool_mode) == (-1, 4, "average")
    assert config.image_mean == [0.1, 0.2, 0.3]
    assert config.tokens_per_frame == 1


@pytest.mark.parametrize("names", ["transformers", "state-spaces"])
@pytest.mark.parametrize("tower_names", ["vision part", "whole CLIP", "siglip"])
@pytest.mark.parametrize("projector_file", ["mm_projector.bin", "projector.safetensors"])
def test_parts_of_several_checkpoints(tmp_path: Path, names: str, tower_names: str, projector_file: str):
    language, tower, mlp = language_model(), clip_tower(), projector()
    build_byte_tokenizer().save_pretrained(tmp_path / "language")
    if names == "transformers":
        language.save_pretrained(tmp_path / "language")
    else:
        tensors = {k.replace("embeddings", "embedding"): v for k, v in language.state_dict().items()}
        torch.save(tensors, tmp_path / "language" / "pytorch_model.bin")
        config = {"d_model": WIDTH, "n_layer": LAYERS, "ssm_cfg": {"layer": "Mamba2", "chunk_size": 8}}
        (tmp_path / "language" / "config.json").write_text(json.dumps(config))
    if tower_names == "whole CLIP":
        text = {k: v for k, v in TOWER.items() if k not in ("image_size", "patch_size")} | {"vocab_size": 30}
        whole = CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=8))
        whole.vision_model.load_state_dict(tower.state_dict())
        whole.save_pretrained(tmp_path / "tower")
    else:
        tower = SiglipVisionModel(SiglipVisionConfig(**TOWER)).eval() if tower_names == "siglip" else tower
        tower.save_pretrained(tmp_path / "tower")
    file = tmp_path / projector_file
    tensors = {f"model.mm_projector.{k}": v for k, v in mlp.state_dict().items()}
    torch.save(tensors, file) if file.suffix == ".bin" else save_file(tensors, file)

    report = convert_checkpoint([tmp_path / "language", tmp_path / "tower", file], tmp_path / "out")
    model = load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, language(IDS).logits, rtol=1e-4, atol=1e-4)
        if tower_names != "siglip":
            rows = model.model.get_video_features(PIXELS)
            torch.testing.assert_close(rows, reference_rows(tower, mlp), rtol=1e-4, atol=1e-5)
    left = [row.name for row in report.rows if row.action == "left over"]
    assert bool(left) == (tower_names == "whole CLIP")
    assert all("text" in name or "visual_projection" in name or "logit" in name for name in left)


def test_a_part_from_two_sources_is_refused(tmp_path: Path, checkpoint, tensors):
    one, two = checkpoint(tensors), checkpoint(tensors)
    with pytest.raises(ConversionError, match="holds as well"):
        convert_checkpoint([one, two], tmp_path / "out")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path, checkpoint):
    tensors = official_tensors(language_model(), clip_tower(), projector())
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        tensors[name] = tensors[name][: ROWS - 20].clone()
    with pytest.raises(ValueError, match="tokenizer has 262 tokens"):
        convert_checkpoint(checkpoint(tensors), tmp_path / "out")


@pytest.mark.parametrize("tokenizer_class", ["GPTNeoXTokenizer", "GPTNeoXTokenizerFast"])
def test_the_tokenizer_of_the_source_gets_video_and_padding(tmp_path: Path, checkpoint, tensors, tokenizer_class: str):
    """Files as GPT-NeoX's: the end of text is a token to learn, so it must not be the padding."""
    source = checkpoint(tensors)
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", "<|padding|>", *byte_alphabet()])}
    text = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    text.pre_tokenizer, text.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    text.save(str(source / "tokenizer.json"))
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (source / "tokenizer_config.json").write_text(json.dumps(end | {"tokenizer_class": tokenizer_class}))
    convert_checkpoint(source, tmp_path / "out")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    config = load(tmp_path / "out").config
    assert tokenizer.convert_tokens_to_ids("<video>") == config.video_token_id == 258
    assert config.pad_token_id == tokenizer.pad_token_id != config.eos_token_id == 0
    assert tokenizer.decode(tokenizer("a film é")["input_ids"]) == "a film é"


def test_nothing_is_left_of_a_conversion_that_failed(tmp_path: Path, checkpoint, tensors, monkeypatch):
    from video_ma2mba.conversion import convert_checkpoint as module

    source, out = checkpoint(tensors), tmp_path / "out"
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(OSError, match="GB left"):
            convert_checkpoint(source, out)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_read", lambda opened, place: opened[0].store.read(place[1]).double())
        with pytest.raises(ValueError, match="its file's index says"):
            convert_checkpoint(source, out)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(FileExistsError, match="interrupted conversion"):
        convert_checkpoint(source, out)


@pytest.mark.parametrize(
    ("count", "arguments", "message"),
    [
        (0, {}, "name a checkpoint"),
        (1, {"to": "gguf"}, "is no layout"),
        (2, {"to": "official"}, "one checkpoint at a time"),
        (1, {"to": "official"}, "no checkpoint of this package"),
    ],
)
def test_wrong_arguments(tmp_path: Path, checkpoint, tensors, count: int, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint([checkpoint(tensors)] * count, tmp_path / "out", **arguments)
