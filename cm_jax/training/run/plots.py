"""RUN/loss.png and RUN/evaluations.png, plots of RUN/metrics.csv and RUN/evaluations.csv."""

import functools
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from cm_jax.io.atomic import atomic_write
from cm_jax.training.run.metrics_log import BATCHES, EVALUATIONS, METRICS, read_metrics

_COLORS = {"loss": "C0", "learning_rate": "C2", "gradient_norm": "C1", "images_per_second": "C4"}
"""Columns of metrics.csv with a panel. The first is above the others."""
_LEVEL = re.compile(r"loss_sigma_[0-9]{1,4}")
"""Columns of the loss by noise level, lowest first."""
_EVALUATED = re.compile(r"(.+)(?<!_deviation)_([0-9]{1,7}_steps?)")
"""Columns of evaluations.csv: metric and sampling steps."""
_TITLES = {"images_per_second": "images/s", "fid": "FID", "sfid": "sFID", "kid": "KID", "inception_score": "IS"}
"""Titles of panels. Default: the name in words."""
_LOGARITHMIC = ("loss", "loss_by_noise_level", "gradient_norm", "fid", "sfid", "kid")
_SMOOTHING_WINDOWS = 50
"""Length of a curve in smoothing windows."""
_WIDTH, _HEIGHT, _DPI = 10.0, 3.0, 150

_log = logging.getLogger(__name__)

_Line = tuple[np.ndarray, dict[str, Any]]
"""Values and style."""


class _Panel(NamedTuple):
    name: str
    lines: list[_Line]
    legend: dict[str, Any] | None = None
    """Arguments of the legend. None: no legend."""


def plot(run: Path) -> None:
    """Plot loss, loss by noise level, learning rate, gradient norm and images/s, as far as logged, and evaluations.

    Only process 0 plots. Without matplotlib, a warning is logged.
    """
    if jax.process_index() != 0 or not _has_matplotlib(run):
        return
    if (run / METRICS).exists():  # it is missing before the first `log_every` batches
        curves = _curves(run / METRICS)
        panels = [_metric(name, curves[name]) for name in _COLORS if name in curves]
        above = panels[:1] if "loss" in curves else []
        _save(run / "loss.png", curves, [above + _loss_by_level(curves), panels[len(above) :]])
    if (run / EVALUATIONS).exists():
        curves = _curves(run / EVALUATIONS)
        panels = _evaluations(curves)
        rows = [panels[start : start + 3] for start in range(0, len(panels), 3)]
        _save(run / "evaluations.png", curves, rows, columns=min(3, len(panels)))


@functools.cache
def _has_matplotlib(run: Path) -> bool:
    """The warning is logged once per run, by the cache."""
    del run
    if missing := importlib.util.find_spec("matplotlib") is None:
        _log.warning("loss.png is not plotted (pip install matplotlib); metrics.csv has all numbers.")
    return not missing


def _curves(file: Path) -> dict[str, np.ndarray]:
    """Columns that have a finite number."""
    names, rows = read_metrics(file)
    table = np.array([[float(value or "nan") for value in row] for row in rows]).reshape(len(rows), len(names))
    return {name: values for name, values in zip(names, table.T, strict=True) if np.isfinite(values).any()}


def smoothed(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Mean of the finite values in a window around each value; the window is 2 % of the curve."""
    width = max(1, len(values) // _SMOOTHING_WINDOWS)
    finite = np.isfinite(values)
    window = np.ones(2 * (width // 2) + 1)
    sums = np.convolve(np.where(finite, values, 0), window, "same")
    counts = np.convolve(finite.astype(float), window, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _metric(name: str, values: np.ndarray) -> _Panel:
    thick = {"color": _COLORS[name], "linewidth": 1.8}
    thin = thick | {"alpha": 0.3, "linewidth": 0.8}
    lines = [(values, thick)] if name == "learning_rate" else [(values, thin), (smoothed(values), thick)]
    return _Panel(name, lines)


def _loss_by_level(curves: dict[str, np.ndarray]) -> list[_Panel]:
    import matplotlib

    levels = sorted(filter(_LEVEL.fullmatch, curves), key=lambda name: int(name.rpartition("_")[2]))
    if not levels:
        return []
    ends = {0: " (lowest)", len(levels) - 1: " (highest)"} if len(levels) > 1 else {}
    lines: list[_Line] = []
    for place, color in enumerate(matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(levels)))):
        style = {"color": color, "linewidth": 1.6, "label": f"{place + 1}{ends.get(place, '')}"}
        lines.append((smoothed(curves[levels[place]]), style))
    return [_Panel("loss_by_noise_level", lines[::-1], {"ncols": 2, "loc": "upper right"})]


def _evaluations(curves: dict[str, np.ndarray]) -> list[_Panel]:
    """One panel per metric, with one line per number of steps."""
    lines: dict[str, list[_Line]] = {}
    for match in filter(None, map(_EVALUATED.fullmatch, curves)):
        style = {"marker": "o", "markersize": 3, "linewidth": 1.6, "label": match[2].replace("_", " ")}
        lines.setdefault(match[1], []).append((curves[match[0]], style))
    return [_Panel(name, lines[name], legend={}) for name in lines]


def _save(file: Path, curves: dict[str, np.ndarray], rows: list[list[_Panel]], columns: int = 1) -> None:
    """Save rows of panels, each over the whole width or with `columns` columns."""
    from matplotlib.figure import Figure

    rows = [panels for panels in rows if panels]
    if not rows:
        return
    batches = curves[BATCHES]
    figure = Figure(figsize=(_WIDTH, 0.4 + _HEIGHT * len(rows)), dpi=_DPI, layout="constrained")
    figure.suptitle(f"{file.parent.resolve().name}: {int(batches[-1]):,} batches", fontsize=12)
    for panels, subfigure in zip(rows, figure.subfigures(len(rows), 1, squeeze=False)[:, 0], strict=True):
        for place, panel in enumerate(panels, start=1):
            _draw(subfigure.add_subplot(1, max(columns, len(panels)), place), batches, panel)
    with atomic_write(file) as fresh:
        figure.savefig(fresh, format="png")


def _draw(axes: Any, batches: np.ndarray, panel: _Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for values, style in panel.lines:
        single = {"marker": "o"} if np.isfinite(values).sum() == 1 else {}
        axes.plot(batches, values, **style | single)
    if panel.legend is not None:
        axes.legend(fontsize=8, framealpha=0.7, **panel.legend)
    shown = np.concatenate([values for values, _ in panel.lines])
    if panel.name in _LOGARITHMIC and np.min(shown, where=np.isfinite(shown), initial=np.inf) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("batches")
    axes.set_title(_TITLES.get(panel.name, panel.name.replace("_", " ")), fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
