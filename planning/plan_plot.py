"""The picture of `video-ma2mba plan --plot`: memory against length, the paper's formulas beside our predictions."""

from pathlib import Path

from ..modeling_video_ma2mba.state_writing import whole_file

_COLOURS = {"off": "#b23a48", "per_layer": "#d98c3f", "sqrt": "#8a8f3c", "multi_axis": "#2f6f9f", "host": "#54a24b"}
_NAMES = {
    "off": "no checkpointing",
    "per_layer": "every layer",
    "sqrt": "every √L layers",
    "multi_axis": "multi-axis, kept on the GPU",
    "host": "multi-axis, kept on the host",
}
_LENGTHS = range(10, 23)  # powers of two


def draw_memory(config, path: Path, asked=None) -> None:
    """Write the picture for the language model of `config` as PNG: GB above weights, gradients and optimizer state.

    Args:
        asked: a `PlanReport`, whose length, plan and GPU are marked.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text = getattr(config, "text_config", config)
    ours, paper, measured = our_curves(config), paper_curves(text), printed_measurements(text)
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 5.8), dpi=120, sharex=True, sharey=True)
    left, right = axes
    for method, points in paper.items():
        left.plot(*zip(*points, strict=True), color=_COLOURS[method], label=_NAMES[method].split(",")[0])
    for method, points in measured.items():
        left.plot(*zip(*points, strict=True), "o", color=_COLOURS[method], markersize=4)
    if measured:
        left.plot([], [], "o", color="grey", markersize=4, label="measured by the paper (Table 3)")
    for method, points in ours.items():
        right.plot(*zip(*points, strict=True), color=_COLOURS[method], label=_NAMES[method])
    left.set_title("the paper: Figure 1 redrawn from Eq. 12 and Table 7", fontsize=10)
    right.set_title("this package: predicted", fontsize=10)
    if asked is not None:
        mark(axes, asked)
    for ax in axes:
        token_axis(ax)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda gb, _: f"{gb:g}")
        ax.set_ylim(0.2, 400)
        ax.set_xlabel("tokens")
        ax.grid(True, which="major", linewidth=0.4, alpha=0.6)
        for size in (24, 40, 80):
            ax.axhline(size, color="#6b7280", linewidth=0.7, linestyle=":")
            ax.text(2**10, size * 1.04, f"{size} GB", fontsize=8, color="#6b7280")
        ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, frameon=False)
    left.set_ylabel("GB above weights, gradients and optimizer")
    width, layers = text.hidden_size, text.num_hidden_layers
    figure.suptitle(f"Training memory of a Mamba-2 language model, width {width}, {layers} layers", fontsize=11)
    figure.tight_layout()
    with whole_file(path) as draft:
        figure.savefig(draft, format="png")
    plt.close(figure)


def mark(axes, asked) -> None:
    """Show in both halves where the length that was asked for lies, and in the right one what its plan takes."""
    length = f"{asked.tokens:,} tokens" + (f", {asked.frames:,} frames" if asked.frames else "")
    for ax in axes:
        ax.axvline(asked.tokens, color="#111827", linewidth=0.9, linestyle="--")
    axes[0].text(asked.tokens, 0.22, f" {length} ", fontsize=9, ha="right" if asked.tokens > 2**17 else "left")
    taken, room = asked.prediction.above_weights / 1e9, asked.prediction.gpu_peak - asked.prediction.above_weights
    axes[1].plot([asked.tokens], [taken], "*", color="#111827", markersize=13, label=f"your plan: {taken:.1f} GB")
    left = (asked.gpu_memory - room) / 1e9
    axes[1].axhline(left, color="#111827", linewidth=0.9, linestyle="--")
    text = f"{left:.0f} GB left of your GPU's {asked.gpu_memory / 1e9:.0f}"
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
    axes[1].text(2**12, left * 1.06, text, fontsize=9, bbox=behind)  # beside the names of the other lines


def token_axis(axes) -> None:
    """Make the horizontal axis one of tokens: logarithmic, with a label for every power of four (16k, 64k, ...)."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([4**power for power in range(16)]))
    axes.xaxis.set_major_formatter(lambda tokens, _: token_count(tokens))
    axes.xaxis.set_minor_locator(NullLocator())


def token_count(tokens: float) -> str:
    """1024 -> 1k, 2**20 -> 1M; other numbers as they are."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:g}"


def paper_curves(text) -> dict[str, list[tuple[int, float]]]:
    """(tokens, GB) of the paper's cost model: Eq. 12 with every method's l and s, in bf16."""
    from video_ma2mba.planning.paper_formulas import PaperConstants, full_cost, full_optimum

    constants, layers = PaperConstants.of(text), text.num_hidden_layers
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in ("off", "per_layer", "sqrt", "multi_axis")}
    for power in _LENGTHS:
        tokens = 2**power
        numbers = {
            "off": layers * tokens * constants.grid,
            "per_layer": tokens * (layers * constants.layer + constants.grid),
            "sqrt": tokens * layers**0.5 * (constants.layer + constants.grid),
            "multi_axis": full_cost(constants, layers, tokens, *full_optimum(constants, layers, tokens)[:2]),
        }
        for name, value in numbers.items():
            curves[name].append((tokens, 2 * value / 1e9))
    return curves


def printed_measurements(text) -> dict[str, list[tuple[int, float]]]:
    """(tokens, GB) of Table 3 where the model is the one it was measured on."""
    from video_ma2mba.planning.paper_formulas import TABLE_3

    if (text.hidden_size, text.num_hidden_layers) != (2560, 64):
        return {}
    return {name: [(2 ** (10 + i), gb) for i, gb in enumerate(row)] for name, row in TABLE_3.items()}


def our_curves(config) -> dict[str, list[tuple[int, float]]]:
    """(tokens, GB) predicted for the language model under every method."""
    from video_ma2mba.planning.plan_report import memory_by_method

    curves: dict[str, list[tuple[int, float]]] = {}
    for power in _LENGTHS:
        for method, prediction in memory_by_method(config, 2**power).items():
            curves.setdefault(method, []).append((2**power, prediction.above_weights / 1e9))
    return curves
