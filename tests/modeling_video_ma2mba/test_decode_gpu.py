"""Decoding on CUDA: the Triton kernels beside their PyTorch twins, and graphs beside the eager model."""

import pytest
import torch

from video_ma2mba.modeling_video_ma2mba import decode_graph, decode_loop
from video_ma2mba.modeling_video_ma2mba.decode_graph import force_decoding
from video_ma2mba.modeling_video_ma2mba.decode_reference import OPERATIONS as REFERENCE
from video_ma2mba.modeling_video_ma2mba.decode_step import DecodeBuffers, DecodeWeights, token_step

pytestmark = pytest.mark.gpu

NEW = 24
KERNEL_SIZES = {"hidden_size": 128, "head_dim": 64, "state_size": 128, "chunk_size": 256, "num_hidden_layers": 3}


@pytest.fixture
def cuda_model(make_model):
    def make(dtype: torch.dtype, **text):
        model = make_model(text=KERNEL_SIZES | text)
        for name, parameter in model.named_parameters():  # as from_pretrained does it
            fp32 = name.endswith(("A_log", "dt_bias", ".D"))
            parameter.data = parameter.data.to("cuda", torch.float32 if fp32 else dtype)
        model.generation_config.eos_token_id = None
        return model.cuda()

    return make


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, 262, (rows, length), generator=torch.Generator().manual_seed(seed)).cuda()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def compare_with_twins(cuda_model, dtype, batch, slots, sizes, state_dtype) -> None:
    """Both from the same state, step after step, over every slot of the history and its folding."""
    from video_ma2mba.modeling_video_ma2mba.decode_kernels import OPERATIONS as KERNELS

    weights = DecodeWeights.of(cuda_model(dtype, **sizes))
    ours, theirs = (DecodeBuffers(weights, batch, slots, state_dtype) for _ in range(2))
    exact = dtype == torch.float32
    with torch.no_grad():
        for buffers in (ours, theirs):
            generator = torch.Generator("cuda").manual_seed(1)
            buffers.conv.normal_(generator=generator)
            buffers.base.normal_(generator=generator)
        for step in range(2 * slots + 1):
            tokens = text(batch, 1, step)[:, 0]
            for operations, buffers in ((KERNELS, ours), (REFERENCE, theirs)):
                buffers.tokens.copy_(tokens)
                buffers.logits.fill_(torch.nan)
                token_step(operations, weights, buffers, buffers.advance())
            assert relative(ours.logits, theirs.logits) < (2e-5 if exact else 3e-2)
            assert relative(ours.conv, theirs.conv) < (1e-5 if exact else 2e-2)
            assert int(ours.slot) == int(theirs.slot) == (step + 1) % slots
            if exact:
                assert torch.equal(ours.tokens, theirs.tokens)
            for one, other in zip(ours.export(), theirs.export(), strict=True):
                assert relative(one, other) < (1e-5 if exact else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "slots", "sizes"),
    [
        (1, 1, {}),
        (1, 4, {"hidden_size": 96, "head_dim": 24, "state_size": 40, "conv_kernel": 3, "use_conv_bias": False}),
        (3, 1, {"n_groups": 2}),
        (5, 4, {"hidden_size": 96, "head_dim": 24, "state_size": 40, "conv_kernel": 2, "n_groups": 4}),
        (64, 16, {"num_hidden_layers": 1}),
        (1, 3, {"n_groups": 2, "residual_in_fp32": False}),
    ],
)
def test_kernels_equal_their_twins(cuda_model, dtype, batch, slots, sizes):
    compare_with_twins(cuda_model, dtype, batch, slots, sizes, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [1, 4])
def test_tiles_of_large_batches_equal_their_twins(cuda_model, monkeypatch, slots, dtype):
    """What large batches take, on a small one."""
    from video_ma2mba.modeling_video_ma2mba import decode_batch_kernels

    monkeypatch.setattr(decode_batch_kernels, "MANY", 1)
    compare_with_twins(cuda_model, dtype, 3, slots, {"hidden_size": 320, "num_hidden_layers": 1}, dtype)
    compare_with_twins(cuda_model, dtype, 2, slots, {"hidden_size": 256, "n_groups": 2}, dtype)


def answers(model, way: str, **settings):
    with force_decoding(way):
        return model.generate(
            **settings, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, pad_token_id=0
        )


@pytest.mark.parametrize(("batch", "slots"), [(1, None), (1, 5), (3, 1), (6, None)])
@pytest.mark.parametrize("question", [7, 40, 300])
def test_graphs_give_the_same_tokens_in_fp32(cuda_model, monkeypatch, batch, slots, question):
    model = cuda_model(torch.float32)
    model.decode_slots = slots
    ids = text(batch, question)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, : question // 2] = 0
    eager = answers(model, "eager", input_ids=ids, attention_mask=mask)
    failures = []
    monkeypatch.setattr(decode_graph.warnings, "warn", lambda text, **_: failures.append(text))
    for _ in range(2):  # the second time from what was captured
        found = answers(model, "graphs", input_ids=ids, attention_mask=mask)
        assert not failures
        assert torch.equal(found.sequences, eager.sequences)
        assert found.past_key_values.seen_tokens == eager.past_key_values.seen_tokens
        assert relative(found.past_key_values.ssm, eager.past_key_values.ssm) < 1e-4
        assert relative(found.past_key_values.conv, eager.past_key_values.conv) < 1e-4
        for ours, theirs in zip(found.logits, eager.logits, strict=True):
            assert relative(ours, theirs) < 1e-4
        with force_decoding("graphs"):  # the loop that leaves the picking to the graph
            plain = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0)
        assert torch.equal(plain, eager.sequences)


@pytest.mark.parametrize("batch", [1, 4])
def test_logits_are_within_16_bit_rounding(cuda_model, batch):
    """Forced along the same tokens, graphs in bf16 are no further from fp32 than the eager model in bf16 is."""
    model = cuda_model(torch.bfloat16)
    exact = cuda_model(torch.float32)
    exact.load_state_dict(model.state_dict())
    prompt, forced = text(batch, 20), text(batch, NEW, 5)

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -1e9)
        return chosen.scatter_(1, forced[:, ids.shape[1] - 20, None], 0.0)

    ways = ((exact, "eager"), (model, "eager"), (model, "graphs"))
    truth, eager, graphs = (
        torch.stack(answers(which, way, input_ids=prompt, logits_processor=[force]).logits) for which, way in ways
    )
    assert relative(graphs, truth) < 1.3 * relative(eager, truth) + 2e-3
    assert relative(graphs, truth) < 0.05


def test_sampling_is_that_of_transformers(cuda_model):
    model, found = cuda_model(torch.float32), []
    for way in ("eager", "graphs"):
        torch.manual_seed(11)
        found.append(answers(model, way, input_ids=text(2, 9), do_sample=True, temperature=0.8).sequences)
    assert torch.equal(*found)


def test_default_on_cuda_is_graphs(cuda_model, monkeypatch):
    model, runs = cuda_model(torch.bfloat16), []
    plain = decode_loop._DecoderSteps.read
    monkeypatch.setattr(
        decode_loop._DecoderSteps, "read", lambda self, *a, **k: (runs.append(self), plain(self, *a, **k))
    )
    ids = text(1, 5)
    model.generate(ids, max_new_tokens=8)
    assert len(runs) == 1 and runs[0].decoder.settings[0]
    model.generate(ids, max_new_tokens=2)
    assert runs[1].decoder is runs[0].decoder, "what was captured is used for short answers too"
    model.fast_decoding = False
    model.generate(ids, max_new_tokens=8)
    assert len(runs) == 2


def test_large_buffers_are_not_kept(cuda_model, monkeypatch):
    model = cuda_model(torch.bfloat16)
    model.generate(text(2, 5), max_new_tokens=8)
    model.generate(text(1, 5), max_new_tokens=8)
    assert list(decode_graph._kept[model].decoders) == [2, 1]
    monkeypatch.setattr(decode_graph, "_KEPT_SHARE", 0.0)
    model.generate(text(1, 5), max_new_tokens=8)
    assert not decode_graph._kept[model].decoders


def test_a_failed_capture_is_announced_once(cuda_model, monkeypatch):
    model = cuda_model(torch.bfloat16)
    with force_decoding("eager"):
        expected = model.generate(text(1, 5), max_new_tokens=8)

    def fail(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_graph.Decoder, "_captured", fail)
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        assert torch.equal(model.generate(text(1, 5), max_new_tokens=8), expected)
    assert torch.equal(model.generate(text(1, 5), max_new_tokens=8), expected)
