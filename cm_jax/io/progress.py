"""A progress bar on a terminal or in a notebook."""

from collections.abc import Iterator

import numpy as np


def progress(batches: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The batches of `count` images, with a bar that advances with each; written to standard error.

    Without a terminal or a notebook there is no bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    shown = console.is_terminal or console.is_jupyter
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("images", total=count)
        for batch in batches:
            yield batch
            bar.advance(task, len(batch))
