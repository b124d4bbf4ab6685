"""RUN/loss.png and RUN/evaluations.png, plots of RUN/metrics.csv and RUN/evaluations.csv."""

import functools
import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from cm_jax.io.atomic import atomic_write
from cm_jax.training.run.metrics_log import BATCHES, EVALUATIONS, METRICS, read_metrics

_LABELS = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "images_per_second": "images/s",
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score": "Inception score",
}
"""Titles of panels. Default: the name of the column."""
_BELOW = ("learning_rate", "gradient_norm", "images_per_second")
_LOGARITHMIC = ("loss", "gradient_norm", "fid", "sfid", "kid")
_COLORS = {"loss": "C0", "learning_rate": "C2", "gradient_norm": "C1", "images_per_second": "C4"}
_LEVEL = re.compile(r"loss_sigma_[0-9]{1,4}")
"""Columns of the loss by noise level, lowest first."""
_EVALUATED = re.compile(r"(.+)_([0-9]{1,7})_steps?")
"""Columns of evaluations.csv: metric and sampling steps."""
_SMOOTHING_WINDOWS = 50
"""Length of a curve in smoothing windows."""
_WIDTH, _HEIGHT, _DPI = 10.0, 3.0, 150

_log = logging.getLogger(__name__)


def plot(run: Path) -> None:
    """Plot loss, loss by noise level, learning rate, gradient norm and images/s, as far as logged, and evaluations.

    Only process 0 plots. Without matplotlib, a warning is logged.
    """
    if jax.process_index() != 0:
        return
    if importlib.util.find_spec("matplotlib") is None:
        _warn_once(run)
        return
    if (run / METRICS).exists():  # it is missing before the first `log_every` batches
        _plot_metrics(run, _curves(run / METRICS))
    if (run / EVALUATIONS).exists():
        _plot_evaluations(run, _curves(run / EVALUATIONS))


@functools.cache
def _warn_once(run: Path) -> None:
    del run  # once per run, by the cache
    _log.warning("loss.png is not plotted (pip install matplotlib); metrics.csv has all numbers.")


def _curves(file: Path) -> dict[str, np.ndarray]:
    """Columns that have a finite number."""
    columns, rows = read_metrics(file)
    table = np.array([[float(value or "nan") for value in row] for row in rows]).reshape(len(rows), len(columns))
    return {name: table[:, place] for place, name in enumerate(columns) if np.isfinite(table[:, place]).any()}


def _plot_metrics(run: Path, curves: dict[str, np.ndarray]) -> None:
    levels = sorted(filter(_LEVEL.fullmatch, curves), key=_level)
    above = [name for name in ("loss", *levels[:1]) if name in curves]
    below = [name for name in _BELOW if name in curves]

    rows_of_panels = [panels for panels in (above, below) if panels]
    if not rows_of_panels:
        return
    batches = curves[BATCHES]
    figure, subfigures = _figure(run, batches, len(rows_of_panels))
    for subfigure, panels in zip(subfigures, rows_of_panels, strict=True):
        for place, name in enumerate(panels):
            axes = subfigure.add_subplot(1, len(panels), place + 1)
            shown = [curves[name]]
            if name in levels:
                shown = [smoothed(curves[level]) for level in levels]
                _by_level(axes, batches, shown)
            elif name == "learning_rate":
                axes.plot(batches, curves[name], color=_COLORS[name], linewidth=1.8)
            else:
                _raw_and_smoothed(axes, batches, curves[name], _COLORS[name])
            _finish(
                axes,
                shown,
                _LABELS.get(name, "loss by noise level"),
                logarithmic=name in _LOGARITHMIC or name in levels,
            )
    with atomic_write(run / "loss.png") as file:
        figure.savefig(file, format="png")


def _plot_evaluations(run: Path, curves: dict[str, np.ndarray]) -> None:
    """One panel per metric, three in a row, with one curve per number of steps."""
    found = [match for match in map(_EVALUATED.fullmatch, curves) if match and not match[1].endswith("_deviation")]
    metrics = list(dict.fromkeys(match[1] for match in found))
    if not metrics:
        return
    batches = curves[BATCHES]
    figure, subfigures = _figure(run, batches, -(-len(metrics) // 3))
    for place, metric in enumerate(metrics):
        axes = subfigures[place // 3].add_subplot(1, min(3, len(metrics)), place % 3 + 1)
        shown = [match for match in found if match[1] == metric]
        for match in shown:
            label = f"{match[2]} step{'s' if match[2] != '1' else ''}"
            axes.plot(batches, curves[match[0]], marker="o", markersize=3, linewidth=1.6, label=label)
        axes.legend(fontsize=8, framealpha=0.7)
        values = [curves[match[0]] for match in shown]
        _finish(axes, values, _LABELS.get(metric, metric), logarithmic=metric in _LOGARITHMIC)
    with atomic_write(run / "evaluations.png") as file:
        figure.savefig(file, format="png")


def _figure(run: Path, batches: np.ndarray, rows: int) -> tuple[Any, Sequence[Any]]:
    """A figure and its subfigures, one for each row of panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 0.4 + _HEIGHT * rows), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{run.resolve().name}: {int(batches[-1]):,} batches", fontsize=12)
    return figure, list(figure.subfigures(rows, 1, squeeze=False)[:, 0])


def _level(name: str) -> int:
    return int(name.removeprefix("loss_sigma_"))


def smoothed(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Mean of the finite values in a window around each value; the window is 2 % of the curve."""
    width = max(1, len(values) // _SMOOTHING_WINDOWS)
    finite = np.isfinite(values)
    window = np.ones(2 * (width // 2) + 1)
    sums = np.convolve(np.where(finite, values, 0), window, "same")
    counts = np.convolve(finite.astype(float), window, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _raw_and_smoothed(axes: Any, batches: np.ndarray, values: np.ndarray, color: str) -> None:
    axes.plot(batches, values, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(batches, smoothed(values), color=color, linewidth=1.8)


def _by_level(axes: Any, batches: np.ndarray, curves: list[np.ndarray]) -> None:
    import matplotlib

    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(curves)))
    names = [str(place + 1) for place in range(len(curves))]
    if len(curves) > 1:
        names[0], names[-1] = names[0] + " (lowest)", names[-1] + " (highest)"
    for values, color, name in reversed(list(zip(curves, colors, names, strict=True))):
        axes.plot(batches, values, color=color, linewidth=1.6, label=name)
    axes.legend(fontsize=8, ncols=2, loc="upper right", framealpha=0.7)


def _finish(axes: Any, curves: list[np.ndarray], label: str, *, logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    finite = np.concatenate([values[np.isfinite(values)] for values in curves])
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if logarithmic and len(finite) and finite.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(plain)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("batches")
    axes.set_title(label, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
