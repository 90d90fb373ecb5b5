"""VideoMamba's retrieval model against transformers' BERT, torch's attention and the definitions of its features."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, BertModel

from video_ma2mba.modeling_video_ma2mba.configuration_videomamba_retrieval import VideoMambaRetrievalConfig
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba_retrieval import VideoMambaForRetrieval

VISION = dict(hidden_size=24, num_hidden_layers=3, state_size=4, image_size=32, num_frames=4)
TEXT = dict(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=50,
    max_position_embeddings=16,
)  # fmt: skip


def small_config(**changes) -> VideoMambaRetrievalConfig:
    sizes = dict(vision_config=VISION, text_config=TEXT, fusion_layers=1, projection_dim=8, max_text_length=16)
    return VideoMambaRetrievalConfig(**{**sizes, **changes})


def small_model(**changes) -> VideoMambaForRetrieval:
    """A model whose every tensor matters."""
    torch.manual_seed(0)
    model = VideoMambaForRetrieval(small_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim and "_log" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double()


@pytest.fixture(scope="module")
def model() -> VideoMambaForRetrieval:
    return small_model()


@pytest.fixture(scope="module")
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, 4:] = mask[2, 5:] = 0
    return torch.randint(1, 50, (3, 7)), mask


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(3, 4, 3, 32, 32, dtype=torch.float64)


def test_texts_are_read_as_by_transformers_bert(model, texts):
    ids, mask = texts
    bert = BertModel(small_config(text_config={**TEXT, "num_hidden_layers": 2}).text_config, add_pooling_layer=False)
    own = model.text_encoder.bert.state_dict()
    bert.double().eval().load_state_dict({name: own[name] for name in bert.state_dict()})
    expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    vectors, hidden = model.encode_texts(ids, mask)
    assert (hidden - expected)[mask.bool()].abs().max() < 1e-12
    assert torch.allclose(vectors.double(), F.normalize(model.text_proj(expected[:, 0]), dim=-1), atol=1e-6)


def test_fusion_is_attention_to_the_text_then_to_the_clip(model, texts):
    ids, mask = texts
    _, hidden = model.encode_texts(ids, mask)
    tokens = torch.randn(3, 10, 24, dtype=torch.float64)
    layer = model.text_encoder.bert.encoder.layer[-1]

    def attended(part, query, keys, padding):
        made = nn.MultiheadAttention(16, 2, kdim=keys.shape[-1], vdim=keys.shape[-1], batch_first=True).double()
        own = part.self
        weights = {
            "in_proj_bias": torch.cat([own.query.bias, own.key.bias, own.value.bias]),
            "out_proj.weight": part.output.dense.weight,
            "out_proj.bias": part.output.dense.bias,
        }
        if keys.shape[-1] == 16:
            weights["in_proj_weight"] = torch.cat([own.query.weight, own.key.weight, own.value.weight])
        else:
            names = {"q_proj_weight": own.query, "k_proj_weight": own.key, "v_proj_weight": own.value}
            weights |= {name: each.weight for name, each in names.items()}
        made.load_state_dict(weights)
        return part.output.LayerNorm(query + made(query, keys, keys, key_padding_mask=padding)[0])

    own = attended(layer.attention, hidden, hidden, mask == 0)
    looked = attended(layer.crossattention, own, tokens, None)
    inner = F.gelu(layer.intermediate.dense(looked))
    expected = layer.output.LayerNorm(looked + layer.output.dense(inner))
    found = model.fuse(hidden, mask, tokens)
    assert (found - expected)[mask.bool()].abs().max() < 1e-12
    assert torch.equal(model.match(hidden, mask, tokens), model.itm_head(found[:, 0]))
    assert model.predict_words(found).shape == (3, 7, 50)
    words = model.text_encoder
    assert words.cls.predictions.decoder.weight is words.bert.embeddings.word_embeddings.weight


def test_clips_are_a_unit_vector_a_frame_and_their_patches(model, clips):
    hidden = model.vision_encoder(clips).last_hidden_state
    found = model.encode_clips(clips, streams=2)
    assert torch.allclose(found.tokens, hidden[:, 1:])
    frames = hidden[:, 1:].reshape(3, 4, 4, 24).mean(2)
    vectors = F.normalize(model.vision_proj(model.pool_norm(hidden[:, :1] + frames)), dim=-1)
    assert torch.allclose(found.embeds.double(), vectors.mean(1), atol=1e-6)
    assert len(found.streams) == 3
    assert torch.allclose(model.vision_encoder.norm_f(found.streams[-1]), hidden)


def test_hidden_patches_are_not_computed(model, clips):
    everything = torch.arange(16).expand(3, -1)
    assert torch.allclose(model.encode_clips(clips, everything).tokens, model.encode_clips(clips).tokens)
    visible = torch.tensor([[0, 3, 9], [1, 2, 15], [4, 5, 6]])
    found = model.encode_clips(clips, visible, streams=1)
    assert found.tokens.shape == (3, 3, 24) and found.streams[0].shape == (3, 4, 24)
    changed = clips.clone()
    changed[0, 3] += 1  # of clip 0 nothing of the last frame is seen
    assert torch.equal(model.encode_clips(changed, visible).embeds, found.embeds)
    changed[1, 3] += 1
    assert not torch.equal(model.encode_clips(changed, visible).embeds[1], found.embeds[1])
    with pytest.raises(ValueError, match="need scan_order=spatial_first"):
        small_model(vision_config={**VISION, "scan_order": "alternating"}).encode_clips(clips, visible)


def test_pictures_have_no_temporal_position(model, clips):
    before = model.encode_clips(clips[:, :1]).embeds, model.encode_clips(clips).embeds
    with torch.no_grad():
        model.vision_encoder.temporal_pos_embedding += 1
        after = model.encode_clips(clips[:, :1]).embeds, model.encode_clips(clips).embeds
        model.vision_encoder.temporal_pos_embedding -= 1
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1], atol=1e-4)
    with pytest.raises(ValueError, match="a clip of 3 frames was given, this model takes 4"):
        model.encode_clips(clips[:, :3])


def test_what_is_saved_is_what_is_loaded(model, texts, clips, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is VideoMambaForRetrieval and not again.training
    with torch.no_grad():
        one, two = (each(clips, *texts) for each in (model, again))
    assert torch.equal(one.logits_per_text, two.logits_per_text)
    expected = one.text_embeds @ one.video_embeds.T / 0.07
    assert torch.allclose(one.logits_per_text, expected, atol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["text_config"]["vocab_size"] == 50
    travelling = {path.stem for path in tmp_path.glob("*.py")}
    assert {"modeling_videomamba_retrieval", "configuration_videomamba", "mixer_mamba1"} <= travelling


def test_released_sizes():
    with torch.device("meta"):
        model = VideoMambaForRetrieval(VideoMambaRetrievalConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["vision_proj.weight"] == (512, 576) and shapes["text_proj.weight"] == (512, 768)
    assert shapes["temp"] == () and shapes["itm_head.weight"] == (2, 768)
    cross = "text_encoder.bert.encoder.layer.{}.crossattention.self.key.weight"
    assert shapes[cross.format(9)] == (768, 576) and cross.format(8) not in shapes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fusion_layers": 3}, "fusion_layers=3 is not valid: it must be within 1..2"),
        ({"initial_temperature": 0.9}, "initial_temperature=0.9 is not valid"),
        ({"max_text_length": 17}, "max_text_length=17 is not valid: it must be within 3..16"),
        ({"vision_config": {**VISION, "tubelet_size": 2}}, "tubelet_size=2 is not valid"),
        ({"projection_dim": 0}, "projection_dim=0 is not valid"),
    ],
)
def test_what_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        small_config(**changes)
