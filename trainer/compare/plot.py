"""The plot of a comparison: quality against what it costs to run and to train."""

from __future__ import annotations

from pathlib import Path

from ..show.figures import plain, save
from .results import ArmResult, Comparison
from .statistics import Mean


def draw(found: Comparison, folder: Path) -> list[Path]:
    """Writes ``compare.png`` and ``compare.svg``: means over seeds with their 95 % intervals. Arms of one kind at several ratios are a line.

    Args:
        found: the results.
        folder: folder to write to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, kind in enumerate(dict.fromkeys(arm.kind for arm in found.arms.values())):
        arms = {name: arm for name, arm in found.arms.items() if arm.kind == kind}
        label = next(iter(arms)) if len(arms) == 1 else kind
        for axes, cost in ((left, lambda arm: arm.macs), (right, lambda arm: arm.seconds)):
            ordered: list[ArmResult] = sorted(arms.values(), key=lambda arm, cost=cost: cost(arm).mean)
            costs: list[Mean] = [cost(arm) for arm in ordered]
            axes.errorbar(
                [mean.mean for mean in costs],
                [arm.quality.mean for arm in ordered],
                yerr=[arm.quality.interval or 0 for arm in ordered],
                # Seconds differ between the seeds by what else the machine did.
                xerr=[[mean.mean - mean.low for mean in costs], [mean.high - mean.mean for mean in costs]],
                color=f"C{number % 10}",
                marker="osD^vP*X"[number % 8],
                markersize=5,
                capsize=3,
                linewidth=1.2,
                label=plain(label),
            )
    metric = found.metric.replace("_", " ")
    left.set(xlabel="macs_ratio (MACs ÷ dense)", ylabel=f"{metric} ({'higher' if found.higher_is_better else 'lower'} is better)")
    right.set(xlabel="seconds of training")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    bars = "\nbars: 95 % interval of the mean; smallest to largest cost" if found.seeds > 1 else ""
    figure.suptitle(plain(f"{found.title}{bars}"), fontsize=10)
    left.legend(fontsize=8)
    paths = [folder / "compare.png", folder / "compare.svg"]
    save(figure, paths, dpi=150)
    return paths
