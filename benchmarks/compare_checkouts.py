"""Whether two checkouts of this repository compute the same, bit for bit: the bundled model's readings, answers,
logits, gradients, and the planner's figures. For changes that are to change nothing.

    git worktree add ../before COMMIT
    python benchmarks/compare_checkouts.py ../before . --device cpu

Every checkout runs in a process of its own, with the weights of the second and the same frames. On CUDA (bf16 beside
fp32) kernels may add in another order from run to run: there the first checkout runs twice, and what already differs
between its two runs counts as noise. Ends with status 1 where anything differs by more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

QUESTIONS = ("How many squares are there?", "What happens at the end?")
CELLS = {"whole": None, "cells": {"layers_per_block": 3, "segment_length": 300, "offload": False}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="root of the first checkout")
    parser.add_argument("after", type=Path, help="root of the second checkout")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=40, help="frames of noise that are read")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.after / "bundled", args.device, args.frames, args.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = [run(root, args, Path(folder) / name) for root, name in ((args.before, "a"), (args.after, "b"))]
        again = run(args.before, args, Path(folder) / "again") if args.device.startswith("cuda") else results[0]
    sys.exit(1 if report(results[0], results[1], again) else 0)


def run(root: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure one checkout in another process."""
    (folder / "path").mkdir(parents=True)
    (folder / "path" / "video_ma2mba").symlink_to(root.resolve(), target_is_directory=True)
    out = folder / "results.pt"
    command = [sys.executable, __file__, str(args.before.resolve()), str(args.after.resolve()), "--measure", str(out)]
    # Kernels tuned by the first process are those of the second; products add in one order.
    steady = {"TRITON_CACHE_AUTOTUNING": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment = {**os.environ, **steady, "PYTHONPATH": str(folder / "path"), "PYTHONWARNINGS": "ignore"}
    subprocess.run(
        [*command, "--device", args.device, "--frames", str(args.frames)], env=environment, cwd=folder, check=True
    )
    return torch.load(out, weights_only=True)


def report(before: dict[str, Any], after: dict[str, Any], again: dict[str, Any]) -> int:
    """Print a line for every result; how many differ by more than two runs of the first checkout."""
    different = 0
    for name in {**before, **after}:
        if name not in before or name not in after:
            verdict, bad = f"MISSING in the {'first' if name not in before else 'second'} checkout", True
        else:
            change, noise = difference(before[name], after[name]), difference(before[name], again[name])
            bad = change > 2 * noise
            verdict = "equal" if change == 0 else f"{'DIFFERENT' if bad else 'within the noise'}, by {change:.3g}"
            verdict += f" (two runs of the first: {noise:.3g})" if noise else ""
            if change == float("inf") and not isinstance(before[name], Tensor):
                verdict = f"DIFFERENT: {before[name]} and {after[name]}"
        different += bad
        print(f"{name}: {verdict}")
    print(f"{len({**before, **after})} results, {different} different")
    return different


def difference(a: Any, b: Any) -> float:
    """0 for equal bits; the largest difference of tensors; infinity for anything else that is not the same."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if a == b else float("inf")
    if a.dtype != b.dtype or a.shape != b.shape:
        return float("inf")
    if torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)):
        return 0.0
    return max((a.double() - b.double()).abs().max().nan_to_num(float("inf")).item(), 1e-300)


# ---------------------------------------------------------------------------------------------- in its own process
def measure(model_folder: Path, device: str, frames: int, out: Path) -> None:
    """Everything that is compared, of the package that is on the path."""
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, value in results_of(model_folder, device, dtype, frames):
            value = value.detach().cpu().clone() if isinstance(value, Tensor) else value
            results[f"{str(dtype).removeprefix('torch.')} {name}"] = value
    results |= dict(planner_figures())
    torch.save(results, out)


def results_of(folder: Path, device: str, dtype: torch.dtype, frames: int) -> Iterator[tuple[str, Any]]:
    """Reading, asking, and a step of training, as (name, tensor or text)."""
    from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoQuestionAnsweringPipeline

    torch.manual_seed(0)
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
    processor = VideoMa2mbaProcessor.from_pretrained(folder)
    pipe = VideoQuestionAnsweringPipeline(model=model, processor=processor, device=device)
    pixels = torch.randint(0, 256, (frames, 96, 96, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    state = pipe.read(pixels.numpy(), fps=1)
    yield from state_of("state", state)
    yield from state_of("state read on", pipe.append(state, pixels[: frames // 3].numpy(), fps=1))
    for question in QUESTIONS:
        answer = pipe.ask(state, question, max_new_tokens=12, return_scores=True)
        yield f"answer to {question!r}", answer["answer"]
        yield f"score of the answer to {question!r}", torch.tensor(answer["score"], dtype=torch.float64)
    yield "answers in a batch", json.dumps(pipe.ask(state, list(QUESTIONS), max_new_tokens=12))
    yield "answers of beams", json.dumps(pipe.ask(state, QUESTIONS[0], max_new_tokens=6, num_beams=3))
    yield from state_of("state after asking", state)

    ids = torch.randint(10, 500, (2, 700), generator=torch.Generator().manual_seed(2)).to(device)
    mask = (torch.arange(700) >= torch.tensor([[0], [130]])).long().to(device)
    with torch.no_grad():
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=True)
        yield "logits", outputs.logits[mask.bool()]
        yield from state_of("state of two rows", outputs.past_key_values)
        outputs = model(input_ids=ids[:, :1], past_key_values=outputs.past_key_values)
        yield "logits of one token", outputs.logits
    model.train()
    for name, cells in CELLS.items():
        model.model.language_model.set_checkpointing(cells is not None, **(cells or {}))
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss
        loss.backward()
        yield f"loss, {name}", loss
        for parameter, value in model.named_parameters():
            if value.grad is not None:
                yield f"gradient of {parameter}, {name}", value.grad


def state_of(name: str, state: Any) -> Iterator[tuple[str, Any]]:
    for field in ("conv", "ssm"):
        yield f"{name}: {field}", getattr(state, field)
    yield f"{name}: tokens and bytes", (state.seen_tokens, state.nbytes)


def planner_figures() -> Iterator[tuple[str, Any]]:
    """Predicted bytes and seconds of many plans, on kernels and in PyTorch."""
    from video_ma2mba import VideoMa2mbaConfig
    from video_ma2mba.modeling_video_ma2mba import cost_step, recompute_plan

    plan_of = getattr(recompute_plan, "RecomputePlan", None) or recompute_plan.CheckpointPlan
    for width, layers in ((384, 7), (2560, 64)):
        config = VideoMa2mbaConfig(text_config={"hidden_size": width, "num_hidden_layers": layers}).text_config
        for kernels, compute in ((True, 2), (False, 4)):
            for plan in (None, plan_of(1, 4096, False), plan_of(4, 16384, True), plan_of(layers, 1024, False)):
                found = cost_step.predict(config, plan, 2**16, 2, kernels=kernels, compute_bytes=compute)
                figures = (found.gpu_peak, found.host_peak, found.above_weights, list(found.seconds.values()))
                cells = "no plan" if plan is None else f"{plan.layers_per_block} layers x {plan.segment_length}"
                yield f"prediction for width {width}, {'kernels' if kernels else 'PyTorch'}, {cells}", figures


if __name__ == "__main__":
    main()
