"""Run by test_decode_interpreted.py in a process of its own: Triton decides at import whether it interprets.

Prints one line of JSON for each line of settings on stdin: the largest relative differences between the kernels and
their PyTorch twins, both from the same state, step after step, over every slot of the history and its folding.
"""

import json
import sys

import torch

from video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration
from video_ma2mba.modeling_video_ma2mba import decode_batch_kernels, decode_product_kernels
from video_ma2mba.modeling_video_ma2mba.decode_kernels import OPERATIONS as KERNELS
from video_ma2mba.modeling_video_ma2mba.decode_reference import OPERATIONS as REFERENCE
from video_ma2mba.modeling_video_ma2mba.decode_step import DecodeBuffers, DecodeWeights, token_step

VISION = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def differences(batch: int, slots: int, dtype: str, many: bool, sizes: dict) -> dict[str, float]:
    torch.manual_seed(0)
    decode_batch_kernels.MANY = 1 if many else 1 << 30
    text = {"vocab_size": 32, "pad_token_id": 1, "hidden_size": 32, "num_hidden_layers": 1, "head_dim": 16} | sizes
    config = VideoMa2mbaConfig(text_config=Ma2mbaTextConfig(**text).to_dict(), vision_config=VISION, video_token_id=2)
    model = VideoMa2mbaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias", ".D")):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    weights = DecodeWeights.of(model)
    ours, theirs = (DecodeBuffers(weights, batch, slots) for _ in range(2))
    conv, base = torch.randn_like(ours.conv), torch.randn_like(ours.base)
    worst = {"logits": 0.0, "conv": 0.0, "ssm": 0.0}
    for buffers in (ours, theirs):
        buffers.conv.copy_(conv)
        buffers.base.copy_(base)
    for _ in range(slots + 2):
        tokens = torch.randint(3, 32, (batch,))
        for operations, buffers in ((KERNELS, ours), (REFERENCE, theirs)):
            buffers.tokens.copy_(tokens)
            buffers.logits.fill_(torch.nan)
            token_step(operations, weights, buffers, buffers.advance())
        assert int(ours.slot) == int(theirs.slot) == ours.position
        for name, one, other in zip(
            worst, (ours.logits, *ours.export()), (theirs.logits, *theirs.export()), strict=True
        ):
            difference = relative(one, other)
            worst[name] = max(worst[name], difference) if difference == difference else float("inf")
    return worst


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Few large programs: the interpreter's cost is their number.
    decode_product_kernels.PRODUCT.update(BLOCK_N=32, BLOCK_K=32, AHEAD=2)
    with torch.no_grad():
        for line in sys.stdin:
            print(json.dumps(differences(**json.loads(line))), flush=True)
