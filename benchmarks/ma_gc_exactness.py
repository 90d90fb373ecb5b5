"""How exact 16-bit gradients are: every segment length against an fp32 reference, and long runs against each other.

    python benchmarks/ma_gc_exactness.py --model 370m --tokens 16384 --segments 256 1024 4096 --out exactness.csv
    python benchmarks/ma_gc_exactness.py --model 370m --tokens 1048576 --agree l4,s8192 l4,s16384

The error is ||g - g_ref|| / ||g_ref|| over all parameters together. The reference runs in fp32 on the plain PyTorch
scan, the others in bf16 on the kernels; "per_layer" is unsegmented per-layer checkpointing.
"""

import argparse
import datetime
import gc
from pathlib import Path

import torch
from ma_gc import Step, build, configure, zero_gradients
from result_tables import append_rows
from torch import Tensor


def gradients(name: str, tokens: int, method: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameter gradients of one step, on the CPU. The same seeds give the same weights and inputs in any dtype."""
    model = build(name, torch.bfloat16)
    if dtype == torch.float32:
        model.float()  # the very same weights, exactly represented
    on_host = configure(model, method, tokens)
    zero_gradients(model)
    step = Step(model, tokens, on_host)
    step()
    found = {n: p.grad.cpu() for n, p in model.named_parameters()}
    model.set_checkpointing(False)
    del model, step
    gc.collect()
    torch.cuda.empty_cache()
    return found


def relative_error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    difference = sum((found[n].double() - r.double()).pow(2).sum().item() for n, r in reference.items())
    return (difference / sum(r.double().pow(2).sum().item() for r in reference.values())) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="370m")
    parser.add_argument("--tokens", type=int, default=1 << 14)
    parser.add_argument("--segments", nargs="*", type=int, default=[256, 1024, 4096])
    parser.add_argument("--agree", nargs="*", default=[], help="plans such as l4,s8192: compare them with each other")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ma_gc_exactness.csv"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    common = {"hardware": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(),
              "model": arguments.model, "tokens": arguments.tokens}  # fmt: skip
    if arguments.agree:
        reference = None
        for plan in arguments.agree:
            found = gradients(arguments.model, arguments.tokens, f"{plan},host", torch.bfloat16)
            if reference is None:
                reference = found
                continue
            error = relative_error(found, reference)
            rows.append(common | {"method": plan, "against": arguments.agree[0], "relative_error": f"{error:.5f}"})
            print(rows[-1], flush=True)
    else:
        reference = gradients(arguments.model, arguments.tokens, "l1,s4096,gpu", torch.float32)
        methods = ["per_layer", *(f"l4,s{s},gpu" for s in arguments.segments)]
        for method in methods:
            error = relative_error(gradients(arguments.model, arguments.tokens, method, torch.bfloat16), reference)
            rows.append(common | {"method": method, "against": "fp32", "relative_error": f"{error:.5f}"})
            print(rows[-1], flush=True)
    append_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
