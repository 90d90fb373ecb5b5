"""Decoding speed of the 2.7b language model beside transformers and mamba-ssm, and the wait for a second answer.

    python benchmarks/decode_speed.py --out benchmarks/results/decode_speed.csv

Random weights in bf16, prompts of 64 tokens, greedy, no end token. Every row is one process's `generate()` as a user
calls it: tokens per second are the difference between a long and a short answer over the difference in length (all
rows of the batch together), so the prompt's share cancels out; the median of three. `short_s` is the short answer as a
whole. Ways of ours: eager (the model's forward pass), graphs (the default on CUDA), and in large batches graphs with
the state kept in bf16 between tokens; "written" is after how many tokens a state is written down. `logits_error` is
the relative distance of 16 steps' logits from those of the eager model run in fp32, forced along the same tokens.
The second question: 20 tokens asked of a state that is there, until its first token.
"""

import argparse
import datetime
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_models import SIZES, TINY_TOWER, video_model
from result_tables import hardware, row_writer

PROMPT, SHORT, LONG = 64, 8, 136
FIELDS = ["hardware", "date", "model", "batch", "implementation", "way", "tokens_per_s", "ms_per_token", "short_s",
          "peak_gb", "logits_error"]  # fmt: skip


def build_ours(size: str):
    """The whole video model with a vision tower as small as possible."""
    model = video_model(size, vision_config=TINY_TOWER)
    model.generation_config.eos_token_id = None
    return model


def build_mamba_ssm(size: str):
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    width, layers = SIZES[size]
    config = MambaConfig(d_model=width, n_layer=layers, vocab_size=50288, ssm_cfg={"layer": "Mamba2"})
    return MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()


def build_transformers(size: str):
    from transformers import Mamba2Config, Mamba2ForCausalLM

    width, layers = SIZES[size]
    config = Mamba2Config(
        hidden_size=width, num_hidden_layers=layers, num_heads=2 * width // 64, vocab_size=50288, n_groups=1
    )
    with torch.device("cuda"):
        model = Mamba2ForCausalLM(config).bfloat16().eval()
    model.generation_config.eos_token_id = None
    return model


def seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def rate(generate: Callable[[int], object], batch: int, repeats: int, long: int = LONG) -> dict:
    """Table fields from `generate(new tokens)`; a first call of each length compiles and captures."""
    torch.cuda.reset_peak_memory_stats()
    generate(SHORT)
    generate(SHORT)
    short, whole = ([seconds(lambda n=n: generate(n)) for _ in range(repeats)] for n in (SHORT, long))
    short, whole = (sorted(times)[len(times) // 2] for times in (short, whole))
    each = (whole - short) / (long - SHORT)
    return {
        "tokens_per_s": round(batch / each, 1), "ms_per_token": round(1000 * each, 3), "short_s": round(short, 4),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }  # fmt: skip


def forced_logits(model, way: str, steps: int = 16) -> torch.Tensor:
    """Logits (steps, 1, V) along tokens that are given."""
    from video_ma2mba.modeling_video_ma2mba.decode_graph import force_decoding

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 50000, (1, PROMPT + steps), generator=generator).cuda()

    def force(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -1e9).scatter_(1, ids[:, seen.shape[1], None], 0.0)

    with force_decoding(way):
        found = model.generate(
            ids[:, :PROMPT], max_new_tokens=steps, logits_processor=[force], output_logits=True,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    return torch.stack(found.logits)


def ours(size: str, batches: list[int], write: Callable[[dict], None]) -> None:
    from video_ma2mba.modeling_video_ma2mba.decode_graph import force_decoding, release_decoders

    model = build_ours(size)

    def generate(ids: torch.Tensor, new: int):
        return model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)

    for batch in batches:
        ids = torch.randint(10, 50000, (batch, PROMPT), device="cuda")
        ways = [("graphs", torch.float32, None), ("eager", torch.float32, None)]
        if batch > 1:
            ways += [("graphs", torch.float32, 1), ("graphs", torch.bfloat16, 16), ("graphs", torch.bfloat16, 1)]
        for way, dtype, slots in ways:
            model.decode_state_dtype, model.decode_slots = dtype, slots
            with force_decoding(way):
                fast = way == "graphs"
                row = rate(lambda n, i=ids: generate(i, n), batch, 3 if fast else 1, LONG if fast else SHORT + 16)
            name = way if dtype == torch.float32 else f"{way}, bf16 state"
            write(
                row | {"implementation": "ours", "batch": batch, "way": name + (f", written {slots}" if slots else "")}
            )
            release_decoders(model)
    model.decode_state_dtype, model.decode_slots = torch.float32, None
    second_question(model, size, write)
    in_bf16 = {way: forced_logits(model, way) for way in ("eager", "graphs")}
    release_decoders(model)
    truth = forced_logits(model.float(), "eager")
    for way, logits in in_bf16.items():
        error = ((logits - truth).norm() / truth.norm()).item()
        write({"implementation": "ours", "batch": 1, "way": f"{way}, forced tokens", "logits_error": f"{error:.2e}"})


def second_question(model, size: str, write: Callable[[dict], None]) -> None:
    """Time to the first token of another question on a state, eagerly and by graphs."""
    from video_ma2mba.modeling_video_ma2mba.decode_graph import force_decoding

    ids = torch.randint(10, 50000, (1, 4096), device="cuda")
    with torch.no_grad():
        state = model(input_ids=ids, logits_to_keep=1).past_key_values
    question = torch.randint(10, 50000, (1, 20), device="cuda")

    def ask(new: int):
        return model.generate(
            question, past_key_values=state.fork(), max_new_tokens=new, do_sample=False, pad_token_id=0
        )

    for way in ("eager", "graphs"):
        with force_decoding(way):
            first = seconds(lambda: ask(4))  # captures, as a first answer does
            times = sorted(seconds(lambda: ask(1)) for _ in range(9))
        print(f"first question, four tokens ({way}): {first:.3f} s")
        label = f"{way}, second question to its first token"
        write({"implementation": "ours", "batch": 1, "way": label, "short_s": round(times[4], 4)})


def peers(size: str, batches: list[int], write: Callable[[dict], None]) -> None:
    model = build_mamba_ssm(size)
    for batch in batches:
        ids = torch.randint(10, 50000, (batch, PROMPT), device="cuda")
        for graphs in (True, False):
            long = LONG if graphs else SHORT + 32
            row = rate(
                lambda n, i=ids, g=graphs: model.generate(i, max_length=PROMPT + n, cg=g, top_k=1), batch, 3, long
            )
            write(row | {"implementation": "mamba-ssm", "batch": batch, "way": "CUDA graphs" if graphs else "eager"})
            model._decoding_cache = None
    del model
    gc.collect()
    torch.cuda.empty_cache()
    model = build_transformers(size)
    for batch in batches:
        ids = torch.randint(10, 50000, (batch, PROMPT), device="cuda")
        row = rate(
            lambda n, i=ids: model.generate(i, max_new_tokens=n, do_sample=False, pad_token_id=0), batch, 3, SHORT + 24
        )
        write(row | {"implementation": "transformers", "batch": batch, "way": "eager"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="2.7b", choices=SIZES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--only", choices=["ours", "peers"], help="measure one side only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode_speed.csv"))
    arguments = parser.parse_args()
    about = {"hardware": hardware("cuda"), "date": datetime.date.today().isoformat(), "model": arguments.model}
    write = row_writer(arguments.out, FIELDS, **about)
    for side in (ours, peers):
        if arguments.only in (None, side.__name__):
            side(arguments.model, arguments.batches, write)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
