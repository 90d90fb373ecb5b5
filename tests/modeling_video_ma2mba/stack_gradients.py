"""Small random stacks, and every gradient of a loss over what they compute."""

import torch

from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import Ma2mbaTextConfig
from video_ma2mba.modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel
from video_ma2mba.modeling_video_ma2mba.state_video import VideoState


def make_model(layers: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> Ma2mbaTextModel:
    torch.manual_seed(seed)
    config = Ma2mbaTextConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=layers, state_size=6, head_dim=8, num_heads=4, n_groups=2,
        chunk_size=8,
    )  # fmt: skip
    model = Ma2mbaTextModel(config).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_state(model: Ma2mbaTextModel, batch: int) -> VideoState:
    state = VideoState.zeros(model.config, batch, dtype=torch.float64)
    state = VideoState.from_stacked(torch.randn_like(state.conv), torch.randn_like(state.ssm))
    state.conv.requires_grad_()
    state.ssm.requires_grad_()
    return state


def gradients(model, x, state=None, keep=None, final_state_weight=0.0, **kwargs):
    """Every gradient of a loss over hidden states and, when asked, the final state."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    start = None
    if state is not None:
        start = VideoState.from_stacked(state.conv, state.ssm)
        state.conv.grad = state.ssm.grad = None
    torch.manual_seed(1)
    hidden, after = model.scan(x, start, output_positions=keep, **kwargs)
    conv, ssm = after.stacked()
    real = kwargs.get("attention_mask")
    if keep is None and real is not None:
        hidden = hidden[real.bool()]
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype, device=hidden.device).view(hidden.shape)
    loss = (hidden * weights).sum() + (hidden**2).sum()
    if final_state_weight:
        loss = loss + final_state_weight * ((conv**2).sum() + (ssm**2).sum())
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found["input"] = x.grad
    if state is not None:
        found |= {"start.conv": state.conv.grad.clone(), "start.ssm": state.ssm.grad.clone()}
    return loss.detach(), found
