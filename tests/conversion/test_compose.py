"""Composing: every layout of checkpoint ends up under the right names, with the numbers it had."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from video_ma2mba.conversion.compose import PRESETS, compose
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT_TOWER = {k: v for k, v in TOWER.items() if k not in ("image_size", "patch_size")} | {"vocab_size": 30}
WIDTH, LAYERS, ROWS = 16, 2, 272


def mamba(tie: bool = True, **overrides) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": ROWS,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "state_size": 8,
        "head_dim": 8,
        "num_heads": 4,
        "n_groups": 1,
        "chunk_size": 8,
        "tie_word_embeddings": tie,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return Mamba2ForCausalLM(Mamba2Config(**(fields | overrides)))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A checkpoint in transformers' layout, with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("mamba")
    mamba().save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(folder)
    return folder


def composed(out, **arguments):
    defaults = {"language_model": None, "vision_tower": None, "preset": None, "dtype": torch.float32}
    assert (
        compose(out=out, **(defaults | {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()})) == out
    )
    model, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("files", ["one safetensors", "shards", "pickle"])
def test_transformers_layout(tmp_path, tower, tie, files):
    source = mamba(tie)
    folder = tmp_path / "mamba"
    source.save_pretrained(folder, max_shard_size="10KB" if files == "shards" else "1GB")
    build_byte_tokenizer().save_pretrained(folder)
    if files == "pickle":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    model = composed(tmp_path / "out", language_model=folder, vision_tower=tower)
    ids = torch.randint(6, 262, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, source(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings == tie
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie


@pytest.mark.parametrize("tie", [True, False])
def test_state_spaces_layout(tmp_path, tower, tie):
    source = mamba(tie)
    folder = tmp_path / "mamba"
    folder.mkdir()
    config = {
        "d_model": WIDTH,
        "d_intermediate": 0,
        "n_layer": LAYERS,
        "vocab_size": 262,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 8},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": tie,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {k.replace("embeddings", "embedding"): v.clone() for k, v in source.state_dict().items()}
    tensors["lm_head.weight"] = source.lm_head.weight.detach().clone()  # state-spaces stores it even when tied
    torch.save(tensors, folder / "pytorch_model.bin")
    tokenizer = tmp_path / "tokenizer"
    build_byte_tokenizer().save_pretrained(tokenizer)

    model = composed(tmp_path / "out", language_model=folder, vision_tower=tower, tokenizer=tokenizer)
    assert model.config.text_config.vocab_size == ROWS
    ids = torch.randint(6, 262, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, source(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["clip vision", "clip", "siglip"])
def test_towers(tmp_path, language_model, tower, kind):
    folder, pixels = tmp_path / "tower", torch.randn(2, 3, 16, 16)
    if kind == "clip vision":
        folder, source = tower, CLIPVisionModel.from_pretrained(tower)
    else:
        config_class, model_class = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[kind]
        whole = model_class(config_class(vision_config=TOWER, text_config=TEXT_TOWER))
        whole.save_pretrained(folder)
        source = whole.vision_model
    if kind == "siglip":
        statistics = {"image_mean": [0.4, 0.4, 0.4], "image_std": [0.6, 0.6, 0.6]}
        (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    model = composed(tmp_path / "out", language_model=language_model, vision_tower=folder)
    source = source.eval()
    with torch.no_grad():
        found = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(found, source(pixels, output_hidden_states=True).hidden_states[-2])
    assert model.config.image_mean[0] == (0.4 if kind == "siglip" else pytest.approx(0.48145466))


def test_the_result_answers_questions(tmp_path, language_model, tower, raw_video):
    model = composed(tmp_path / "out", language_model=language_model, vision_tower=tower)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokens_per_frame == model.config.tokens_per_frame == 4
    assert model.config.video_token_id == processor.video_token_id == 2
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 1
    messages = [{"role": "user", "content": [{"type": "video", "video": raw_video(3)}, {"type": "text", "text": "?"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1


def test_a_full_vocabulary_grows(tmp_path, tower):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    source, folder = mamba(vocab_size=48), tmp_path / "mamba"
    source.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, 48)}}, unk_token="w1"))
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, bos_token=end).save_pretrained(folder)
    model = composed(tmp_path / "out", language_model=folder, vision_tower=tower)
    assert model.config.text_config.vocab_size == 64
    assert model.config.video_token_id == 48
    old = source.backbone.embeddings.weight
    torch.testing.assert_close(model.get_input_embeddings().weight[:48], old)
    torch.testing.assert_close(model.get_input_embeddings().weight[50], old.mean(dim=0))


def test_presets_random_weights_and_seeds(tmp_path, monkeypatch, tower):
    monkeypatch.setitem(PRESETS, "tiny", (64, 1))
    one, again, other = (
        composed(tmp_path / name, preset="tiny", vision_tower=tower, dtype=torch.bfloat16, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert stored["model.multi_modal_projector.linear_1.weight"].dtype == torch.bfloat16
    assert stored["model.language_model.layers.0.mixer.A_log"].dtype == torch.float32
    for name, tensor in one.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, again.state_dict()[name]), name
    name = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert one.state_dict()[name].std() > 0.01


def test_config_only(tmp_path, language_model, tower):
    compose(str(language_model), str(tower), None, tmp_path / "small", torch.float32, config_only=True)
    compose(None, None, "2.7b", tmp_path / "large", torch.float32, config_only=True)
    small, large = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("small", "large"))
    assert small["text_config"]["hidden_size"] == WIDTH
    assert (large["text_config"]["vocab_size"], large["video_token_id"]) == (50288, 50277)
    assert [path.name for path in (tmp_path / "large").iterdir()] == ["config.json"]
    # arXiv 2411.19460: 3.015 B parameters with tied embeddings (3.1B when the head is counted by itself)
    from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration

    with torch.device("meta"):
        model = VideoMa2mbaForConditionalGeneration(VideoMa2mbaConfig.from_pretrained(tmp_path / "large"))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(3.015, abs=0.001)


def test_bad_checkpoints(tmp_path, language_model, tower):
    def attempt(error, message, **arguments):
        given = {"language_model": str(language_model), "vision_tower": str(tower), "preset": None} | arguments
        with pytest.raises(error, match=message):
            compose(out=tmp_path / "out", dtype=torch.float32, **given)
        assert not (tmp_path / "out").exists()

    def damaged(change, name):
        folder = tmp_path / name
        mamba().save_pretrained(folder)
        build_byte_tokenizer().save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    attempt(ValueError, "370m", preset="7b")
    attempt(ValueError, "name a language model and a vision tower", vision_tower=None)
    attempt(FileNotFoundError, "no directory", language_model=str(tmp_path / "nowhere"))
    attempt(FileNotFoundError, r"no config\.json", language_model=str(tmp_path))
    attempt(ValueError, "no Mamba-2 checkpoint", language_model=str(tower))
    attempt(ValueError, "no CLIP or SigLIP", vision_tower=str(language_model))
    key = "backbone.layers.1.mixer.in_proj.weight"
    attempt(ValueError, "missing tensors.*in_proj", language_model=damaged(lambda t: t.pop(key), "missing"))
    attempt(ValueError, "in_proj.*shape", language_model=damaged(lambda t: t.update({key: t[key][1:]}), "short"))

    one = tmp_path / "mamba1"
    one.mkdir()
    (one / "config.json").write_text('{"d_model": 16, "n_layer": 2, "vocab_size": 262, "ssm_cfg": {}}')
    attempt(ValueError, "Mamba1", language_model=str(one))
    (one / "config.json").write_text("{")
    attempt(ValueError, r"config\.json of .*mamba1 is damaged", language_model=str(one))
