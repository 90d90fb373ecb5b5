"""A released multi-modal file, a synthetic one of its exact names, becomes a retrieval model, and comes back."""

import pytest
import torch
from test_videomamba_checkpoint import WIDTH, released
from transformers import AutoModel, BertConfig, BertForMaskedLM

from video_ma2mba.conversion.videomamba_checkpoint import convert_videomamba, restore_videomamba
from video_ma2mba.trainer.videomamba.starting_model import encoder_weights, stored_model

HIDDEN = 64


def multi_modal(start: str = "", tied: bool = True) -> dict[str, torch.Tensor]:
    """Names as in the facts: encoder with `norm`, `pool_norm` and `clip_decoder` inside, BERT as transformers names
    it, its last layer with cross-attention to the encoder's width."""
    tensors = released("multi-modal")
    tensors = {name: t for name, t in tensors.items() if name.startswith("vision_encoder.")}
    tensors["vision_encoder.pool_norm.bias"] = torch.randn(WIDTH)
    sizes = dict(hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96, vocab_size=50)
    bert = BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=40)).state_dict()
    text = {f"text_encoder.{name}": torch.randn_like(tensor) for name, tensor in bert.items()}
    predictions, words = "text_encoder.cls.predictions.", "text_encoder.bert.embeddings.word_embeddings.weight"
    if tied:
        text[f"{predictions}decoder.weight"] = text[words].clone()
        text[f"{predictions}decoder.bias"] = text[f"{predictions}bias"].clone()
    text["text_encoder.bert.embeddings.position_ids"] = torch.arange(40)[None]
    cross = "text_encoder.bert.encoder.layer.1.crossattention."
    for name, width in {"self.query": HIDDEN, "self.key": WIDTH, "self.value": WIDTH, "output.dense": HIDDEN}.items():
        text |= {f"{cross}{name}.weight": torch.randn(HIDDEN, width), f"{cross}{name}.bias": torch.randn(HIDDEN)}
    text |= {f"{cross}output.LayerNorm.{name}": torch.randn(HIDDEN) for name in ("weight", "bias")}
    heads = {"vision_proj": (12, WIDTH), "text_proj": (12, HIDDEN), "itm_head": (2, HIDDEN)}
    for name, shape in heads.items():
        text |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    text |= {"temp": torch.tensor(0.05), "clip_teacher.x": torch.randn(3)}
    return {start + name: tensor for name, tensor in (tensors | text).items()}


@pytest.mark.parametrize(("start", "tied"), [("", True), ("module.", True), ("", False)])
def test_it_converts_and_comes_back_bit_for_bit(tmp_path, start, tied):
    before = multi_modal(start, tied)
    torch.save({"model": before}, tmp_path / "released.pth")
    report = convert_videomamba(str(tmp_path / "released.pth"), tmp_path / "out")
    assert {row.name for row in report.rows} == before.keys() and len(report.rows) == len(before)
    actions = {row.name.removeprefix(start): row.action for row in report.rows}
    assert actions["vision_encoder.norm.weight"] == "renamed" and "left over" not in actions.values()
    assert actions["text_encoder.cls.predictions.decoder.weight"] == ("tied" if tied else "kept beside")
    assert actions["clip_teacher.x"] == actions["text_encoder.bert.embeddings.position_ids"] == "kept beside"

    model, loading = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    renamed = {"vision_encoder.norm_f.weight": "vision_encoder.norm.weight"}
    for name, parameter in model.named_parameters():
        source = "vision_encoder." + name if name.startswith("pool_norm.") else renamed.get(name, name)
        assert torch.equal(parameter, before[start + source]), name
    config = model.config
    assert (config.fusion_layers, config.projection_dim, config.text_config.num_attention_heads) == (1, 12, 1)
    clip, ids = torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8), torch.tensor([[1, 2, 3]])
    assert torch.isfinite(model(clip, ids).logits_per_text).all()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"({report.parameters:,})" in card and "No recall was measured" in card

    restore_videomamba(tmp_path / "out", tmp_path / "back.pth")
    after = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_recipes_start_from_the_file_itself(tmp_path):
    before = multi_modal()
    torch.save(before, tmp_path / "released.pth")
    fields, weights, folder = stored_model(str(tmp_path / "released.pth"))
    assert folder is None and fields["text_config"]["vocab_size"] == 50
    assert torch.equal(weights["itm_head.weight"], before["itm_head.weight"])
    config, encoder = encoder_weights(str(tmp_path / "released.pth"))
    assert config.hidden_size == WIDTH and torch.equal(encoder["norm_f.weight"], before["vision_encoder.norm.weight"])


def test_what_does_not_belong_together_is_said(tmp_path):
    before = multi_modal()
    del before["text_encoder.bert.encoder.layer.0.output.dense.bias"]
    torch.save(before, tmp_path / "released.pth")
    with pytest.raises(ValueError, match="text_encoder.bert.encoder.layer.0.output.dense.bias"):
        convert_videomamba(str(tmp_path / "released.pth"), tmp_path / "out")
