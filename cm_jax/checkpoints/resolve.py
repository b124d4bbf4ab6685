"""From a path or a name to the files of a checkpoint."""

import difflib
from pathlib import Path

from cm_jax.checkpoints import native
from cm_jax.checkpoints.published import BUNDLED, published, published_cifar10
from cm_jax.errors import InputError


def resolve(path_or_name: str | Path) -> Path:
    """The checkpoint of a path or of a bundled name.

    The folder of a training run stands for its latest checkpoint, and RUN/best for the best of those evaluated. Raises
    InputError where there is no such checkpoint.
    """
    path, name = Path(path_or_name), str(path_or_name)
    try:
        path = path.expanduser()
        if (path / "checkpoints").is_dir() and not native.is_checkpoint(path):
            found = native.run_checkpoints(path)
            if not found:
                raise InputError(f"The run in {path} has no checkpoint yet: continue its training first.")
            return found[max(found)]
        if path.name == "best" and (path.parent / "checkpoints").is_dir() and not path.exists():
            return _best(path.parent)
        if path.is_file() or path.is_dir():
            return path
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name[:80]} cannot be a path: {error}.") from error
    if name in BUNDLED:
        return BUNDLED[name]
    remote = {name: entry for name, entry in published().items() if name not in BUNDLED} | published_cifar10()
    entry = remote.get(name.removesuffix(".pt"))
    if entry:
        raise InputError(f"{name} is a published checkpoint: download {entry.url} and pass the path of the file.")
    close = difflib.get_close_matches(name, BUNDLED | remote, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise InputError(
        f"There is no checkpoint {name}. Expected a .pt file, a diffusers folder, a jcm checkpoint, a native "
        f"checkpoint or the name of a bundled one ({', '.join(BUNDLED)}).{hint}"
    )


def _best(run: Path) -> Path:
    step = native.best_checkpoint(run)
    if step is None:
        raise InputError(f"No checkpoint of {run} has been evaluated (--evaluation); use {run} itself.")
    found = native.run_checkpoints(run).get(step)
    if found is None:
        raise InputError(f"The best checkpoint of {run}, at step {step}, has been deleted; use {run} itself.")
    return found
