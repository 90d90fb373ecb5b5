"""Reading speed and memory of the 2.7b language model, by length, beside transformers and mamba-ssm.

    python benchmarks/prefill_speed.py --out benchmarks/results/prefill_speed.csv

Random weights in bf16, batch 1, no gradients; only the state (and one row of hidden states) is wanted. Ours, "one
call": the whole length as embeddings on the GPU. Ours, "stream": token ids from host memory in pieces, each from the
state of the one before, as videos are read; pieces of one segment. The peers read token ids in one call and keep
their cache; "CUDA out of memory" is a result, after which a peer is not asked for more. `gb_above_weights` is the peak
of allocated memory above the weights, inputs included. Kernels are tuned by a first call, not timed: ours of two
segments, a peer's of the length itself.
"""

import argparse
import datetime
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from decode_speed import build_mamba_ssm, build_transformers
from random_models import SIZES, text_model
from result_tables import hardware, row_writer

FIELDS = ["hardware", "date", "model", "implementation", "way", "tokens", "segment", "tokens_per_s",
          "gb_above_weights"]  # fmt: skip


def measure(read: Callable[[], object], tokens: int, base: int, warm: bool = False) -> dict:
    """Speed and memory of one call of `read` (the second, if `warm`); out of memory is a result."""
    try:
        if warm:
            read()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        read()
        torch.cuda.synchronize()
        spent = time.perf_counter() - start
    except torch.OutOfMemoryError:
        return {"tokens": tokens, "tokens_per_s": "CUDA out of memory"}
    peak = torch.cuda.max_memory_allocated() - base
    return {"tokens": tokens, "tokens_per_s": round(tokens / spent), "gb_above_weights": round(peak / 1e9, 2)}


def one_row(tokens: int) -> torch.Tensor:
    keep = torch.zeros(1, tokens, dtype=torch.bool)
    keep[0, -1] = True
    return keep


def ours(size: str, lengths: list[int], segments: list[int], write: Callable[[dict], None]) -> None:
    model = text_model(size)
    base, usual = torch.cuda.memory_allocated(), model.prefill_segment_length

    def stream(tokens: int) -> None:
        ids, state, step = torch.randint(10, 50000, (1, tokens)), None, model.prefill_segment_length
        for piece in ids.split(step, dim=1):
            keep = one_row(piece.shape[1])
            state = model(input_ids=piece.cuda(), past_key_values=state, output_positions=keep).past_key_values

    def one_call(tokens: int) -> None:
        x = torch.empty(1, tokens, model.config.hidden_size, dtype=torch.bfloat16, device="cuda").normal_(std=0.1)
        model(inputs_embeds=x, output_positions=one_row(tokens))

    for segment in segments:
        model.prefill_segment_length = segment
        one_call(2 * segment)
        row = measure(lambda: one_call(1 << 16), 1 << 16, base)
        write(row | {"implementation": "ours", "way": "one call", "segment": segment})
    model.prefill_segment_length = usual
    stream(2 * usual)
    for tokens in lengths:
        row = measure(lambda n=tokens: stream(n), tokens, base)
        write(row | {"implementation": "ours", "way": "stream", "segment": usual})


def read_by_peer(model: torch.nn.Module, name: str, tokens: int) -> None:
    ids = torch.randint(10, 50000, (1, tokens), device="cuda")
    if name == "transformers":
        model(ids, use_cache=True, logits_to_keep=1)
        return
    from mamba_ssm.utils.generation import InferenceParams

    model(ids, inference_params=InferenceParams(max_seqlen=tokens, max_batch_size=1), num_last_tokens=1)


def peers(size: str, lengths: list[int], segments: list[int], write: Callable[[dict], None]) -> None:
    for name, build in (("mamba-ssm", build_mamba_ssm), ("transformers", build_transformers)):
        try:
            model = build(size)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        base = torch.cuda.memory_allocated()
        for tokens in lengths:
            try:
                row = measure(partial(read_by_peer, model, name, tokens), tokens, base, warm=True)
            except Exception as error:  # a peer's failure is a result as well
                row = {"tokens": tokens, "tokens_per_s": f"{type(error).__name__}: {str(error)[:80]}"}
            write(row | {"implementation": name, "way": "one call"})
            if "gb_above_weights" not in row:
                break
        del model
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="2.7b", choices=SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 21])
    parser.add_argument("--peer-lengths", nargs="+", type=int, default=[1 << 12, 1 << 14, 1 << 16])
    parser.add_argument("--segments", nargs="*", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prefill_speed.csv"))
    arguments = parser.parse_args()
    about = {"hardware": hardware("cuda"), "date": datetime.date.today().isoformat(), "model": arguments.model}
    write = row_writer(arguments.out, FIELDS, **about)
    with torch.no_grad():
        for side, lengths in ((ours, arguments.lengths), (peers, arguments.peer_lengths)):
            side(arguments.model, lengths, arguments.segments, write)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
