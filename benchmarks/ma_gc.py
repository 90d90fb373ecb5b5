"""Memory and speed of one training step of the language model, by length and checkpointing method.

    python benchmarks/ma_gc.py --models 2.7b --tokens 16384 65536 --methods per_layer multi_axis --out results.csv

Random weights in bf16, batch 1, fused kernels (the `cuda` extra). A step is forward and backward of the Mamba-2 stack
with a cross-entropy over 1,024 evenly spaced positions; gradients accumulate into existing ones, as in a training
loop. `gpu_peak_gb` is the peak of allocated memory above weights and gradients, with what CUDA graphs hold for
themselves; the input embeddings and their gradient count wherever they live on the GPU. The first step (kernel tuning,
page-locking) is not timed; with --steps 0 it is, after its host memory was page-locked (for lengths whose steps take
minutes: run a short one before).
Methods: off, per_layer, sqrt, multi_axis (the planner's choice; "multi_axis:5GB:60GB" within so much GPU and host
memory), an explicit plan such as "l4,s16384,host" or
"l2,s8192,gpu". Of models "transformers-2.7b" (transformers' own Mamba-2, on mamba-ssm's kernels where they are
installed) and "llama-3b" (a Llama-3.2-3B-shaped transformer, for scale): off, peer_per_layer (transformers' gradient
checkpointing; also as llama_per_layer) and peer_offload (the same with `offload=True`). `first_s` is the first step's
seconds, `kernels` what the stack ran on.
"""

import argparse
import datetime
import gc
import re
import time
from pathlib import Path

import torch
from random_models import SIZES, text_model
from result_tables import append_rows
from torch import nn

from video_ma2mba.modeling_video_ma2mba.ops_ssd import SSD
from video_ma2mba.modeling_video_ma2mba.recompute_plan import RecomputePlan
from video_ma2mba.modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel

LABELS = 1024
FIELDS = ["hardware", "date", "model", "tokens", "method", "plan", "tokens_per_s", "gpu_peak_gb", "host_gb", "loss",
          "grad_norm", "first_s", "kernels"]  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A randomly initialised stack on the GPU, in training mode."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        if name == "llama-3b":
            from transformers import LlamaConfig, LlamaModel

            config = LlamaConfig(
                hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                num_key_value_heads=8, vocab_size=128256, max_position_embeddings=1 << 22,
            )  # fmt: skip
            return LlamaModel(config).to(dtype).train()
        if name.startswith("transformers-"):
            from transformers import Mamba2Config, Mamba2Model

            width, layers = SIZES[name.removeprefix("transformers-")]
            own = Mamba2Config(
                hidden_size=width, num_hidden_layers=layers, num_heads=2 * width // 64, vocab_size=50288, n_groups=1,
            )  # fmt: skip
            return Mamba2Model(own).to(dtype).train()
    return text_model(name, dtype).train()


class Step:
    """One forward and backward, the same for every method."""

    def __init__(self, model: nn.Module, tokens: int, on_host: bool) -> None:
        self.model, self.tokens = model, tokens
        width, vocabulary = model.config.hidden_size, model.config.vocab_size
        generator = torch.Generator("cuda").manual_seed(tokens)
        dtype = model.get_input_embeddings().weight.dtype
        self.positions = torch.linspace(0, tokens - 1, min(LABELS, tokens)).long().cuda()
        self.keep = torch.zeros(1, tokens, dtype=torch.bool, device="cuda")
        self.keep[0, self.positions] = True
        self.labels = torch.randint(0, vocabulary, (len(self.positions),), generator=generator, device="cuda")
        self.x = torch.empty(1, tokens, width, dtype=dtype, device="cpu" if on_host else "cuda", pin_memory=on_host)
        for start in range(0, tokens, 65536):
            stop = min(start + 65536, tokens)
            noise = torch.randn(1, stop - start, width, generator=generator, device="cuda") * 0.1
            self.x[:, start:stop].copy_(noise.bfloat16())  # the same inputs in every dtype

    def __call__(self) -> float:
        x = self.x.detach().requires_grad_()
        if isinstance(self.model, Ma2mbaTextModel):
            hidden = self.model(inputs_embeds=x, use_cache=False, output_positions=self.keep).last_hidden_state
        else:
            hidden = self.model(inputs_embeds=x, use_cache=False).last_hidden_state[0, self.positions]
        head = self.model.get_input_embeddings().weight
        loss = sum(
            nn.functional.cross_entropy((h @ head.T).float(), y, reduction="sum")
            for h, y in zip(hidden.split(256), self.labels.split(256), strict=True)
        ) / len(self.labels)
        loss.backward()
        return loss.item()


def gradient_norm(model: nn.Module) -> float:
    squares = [p.grad.float().pow(2).sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


def zero_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()


def configure(model: nn.Module, method: str, tokens: int) -> bool:
    """Set the method; returns whether the input should live in host memory."""
    explicit = re.fullmatch(r"l(\d+),s(\d+),(host|gpu)", method)
    if not isinstance(model, Ma2mbaTextModel):
        if method == "off":
            model.gradient_checkpointing_disable()
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False}, offload=method == "peer_offload")
        return False
    model.prefill_segment_length = 1 << 17  # only for "off": one segment, within the kernels' 32-bit offsets
    if method == "off":
        model.set_checkpointing(False)
    elif explicit:
        layers, segment, place = int(explicit[1]), int(explicit[2]), explicit[3]
        model.set_checkpointing(True, layers_per_block=layers, segment_length=segment, offload=place == "host")
        return place == "host"
    elif method in ("per_layer", "sqrt"):
        model.set_checkpointing(True, method=method)
    else:  # "multi_axis", or with budgets "multi_axis:5GB:100GB"
        budgets = dict(zip(("memory_budget", "host_memory_budget"), method.split(":")[1:], strict=False))
        model.set_checkpointing(True, **budgets)
        return bool(budgets)
    return False


def kept_bytes(model: Ma2mbaTextModel, plan: RecomputePlan, tokens: int) -> int:
    """Block inputs in fp32 and the border states of every layer."""
    config = model.config
    states = 4 * config.inner_size * config.state_size + 2 * config.conv_dim * (config.conv_kernel - 1)
    inputs = (len(plan.blocks(len(model.layers))) - 1) * tokens * config.hidden_size * 4
    return inputs + (len(plan.segments(tokens)) - 1) * len(model.layers) * states


def graph_bytes() -> int:
    """Memory that CUDA graphs hold and that does not count as allocated."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def measure(model: nn.Module, name: str, tokens: int, method: str, steps: int) -> dict:
    """One row of the table; a method that does not fit gets a row that says so."""
    row = {"hardware": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "model": name,
           "tokens": tokens, "method": method, "plan": "", "kernels": SSD.backends[0].name}  # fmt: skip
    step = None
    if not isinstance(model, Ma2mbaTextModel):
        row["kernels"] = ""
    try:
        if isinstance(model, Ma2mbaTextModel):
            model.set_checkpointing(False)  # gives back what another method held: graphs, page-locked memory
            gc.collect()
        on_host = configure(model, method, tokens)
        zero_gradients(model)
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        step = Step(model, tokens, on_host)
        seconds, peaks = [], []
        if steps == 0 and (plan := model.engine.settings.fixed_plan(len(model.layers), tokens)) and plan.offload:
            model.engine.reserve_host_memory(kept_bytes(model, plan, tokens))
        for _ in range(steps + 1):
            zero_gradients(model)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            loss = step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            peaks.append(torch.cuda.max_memory_allocated() - base)
        counted = 1 if steps else 0
        row |= {"tokens_per_s": round(tokens / sorted(seconds[counted:])[max(steps - 1, 0) // 2]),
                "gpu_peak_gb": round((max(peaks[counted:]) + graph_bytes()) / 1e9, 2), "loss": round(loss, 4),
                "grad_norm": f"{gradient_norm(model):.5g}", "host_gb": 0.0,
                "first_s": round(seconds[0], 2)}  # fmt: skip
        engine = getattr(model, "engine", None)
        if engine is not None and method != "off":
            plan: RecomputePlan = engine.last_plan
            row["plan"] = (
                f"l={plan.layers_per_block} s={min(plan.segment_length, tokens)} {'host' if plan.offload else 'gpu'}"
            )
            host = engine.last_host_bytes + (2 * step.x.nbytes if on_host else 0)
            row["host_gb"] = round(host / 1e9, 2)
    except (torch.OutOfMemoryError, MemoryError, ValueError) as error:
        row |= {"tokens_per_s": "", "gpu_peak_gb": "does not fit", "plan": str(error)[:80]}
    finally:
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["2.7b"], choices=[*SIZES, "llama-3b", "transformers-2.7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1 << 14, 1 << 16])
    parser.add_argument("--methods", nargs="+", default=["per_layer", "multi_axis"])
    parser.add_argument("--steps", type=int, default=2, help="timed steps after the first; 0 times the first")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ma_gc.csv"))
    arguments = parser.parse_args()
    for name in arguments.models:
        model = build(name)
        for tokens in arguments.tokens:
            for method in arguments.methods:
                row = measure(model, name, tokens, method, arguments.steps)
                print({k: row.get(k) for k in FIELDS[2:]}, flush=True)
                append_rows(arguments.out, [row], FIELDS)
        if isinstance(model, Ma2mbaTextModel):
            model.set_checkpointing(False)  # gives the page-locked memory back
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
