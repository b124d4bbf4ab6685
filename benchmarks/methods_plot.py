"""Plot of the evaluations during training, for benchmarks.methods."""

from pathlib import Path

from cm_jax.training.run.metrics_log import EVALUATIONS, read_metrics


def plot_curves(folders: dict[str, Path], teacher: dict[str, float], file: Path) -> None:
    """Plot one-step FID and KID against training images for each evaluated run, with the teacher as a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, ("fid", "kid"), strict=True):
        for number, (name, folder) in enumerate(folders.items()):
            if (folder / EVALUATIONS).exists():
                columns, rows = read_metrics(folder / EVALUATIONS)
                images, values = (
                    [float(row[columns.index(column)]) for row in rows] for column in ("images", f"{metric}_1_step")
                )
                axes.plot(images, values, marker="osD^v<>Px"[number % 9], markersize=5, label=name)
        axes.axhline(teacher[metric], color="black", linestyle="--", linewidth=1, label="teacher")
        axes.set(title=f"One-step {metric.upper()}", xlabel="training images", yscale="log")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file)
