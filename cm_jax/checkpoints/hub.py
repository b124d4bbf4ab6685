"""Checkpoints of the Hugging Face Hub: ids, downloads, and folders of its cache.

The cache, the token, the address and offline mode are those of `huggingface_hub`: HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE. diffusers uses the same cache.
"""

import contextlib
import difflib
import glob
import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from cm_jax.checkpoints import weight_names
from cm_jax.checkpoints.hub_client import UnreachableError, api, endpoint, full_disk, hub_errors, progress_bars
from cm_jax.errors import InputError
from cm_jax.progress import activity

_log = logging.getLogger(__name__)
_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([\w./-]+))?", re.ASCII)
_FILE_SUFFIXES = (".pt", ".pth", ".pkl", ".ckpt", ".bin", ".safetensors", ".msgpack", ".npz", ".json", ".zip", ".git")
_LOCAL_FOLDERS = ("runs", "checkpoints", "models", "outputs")
"""Usual names of local folders: a missing path in them is not an id."""
_WEIGHTS = "diffusion_pytorch_model"
_SINGLE_FILES = (".safetensors", ".pt", ".pth", ".pkl", ".ckpt", ".bin")


class HubId(NamedTuple):
    """A repository of the Hub, and a branch, tag or commit of it (None: the default branch)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def split_id(name: str) -> HubId | None:
    """The id in "owner/name" or "owner/name@revision"; None for other names, such as those of files."""
    match = _ID.fullmatch(name)
    if not match or "--" in match[1] or ".." in match[1] or match[1].lower().endswith(_FILE_SUFFIXES):
        return None
    return HubId(match[1], match[2])


def parse_id(name: str) -> HubId | None:
    """The id in a name, as `split_id`; None if the name can be a path, because its first part exists or is usual.

    Raises InputError for a name that resembles an existing path.
    """
    found = split_id(name)
    owner, _, second = found.repo.partition("/") if found else ("", "", "")
    if not found or second == "best" or owner in _LOCAL_FOLDERS or os.path.lexists(owner):
        return None
    with contextlib.suppress(OSError):  # a working directory that cannot be listed
        folders = [entry.name for entry in Path().iterdir() if (entry / second).exists()]
        if close := difflib.get_close_matches(owner, folders, n=1):
            raise InputError(f"There is no checkpoint {name}. Did you mean {close[0]}/{second}?")
    return found


def cached_id(path: Path) -> str | None:
    """The id of a file or folder in the Hub cache: models--OWNER--NAME/snapshots/COMMIT/..."""
    for folder in (path.absolute(), *path.absolute().parents):
        if folder.parent.name == "snapshots" and (name := folder.parent.parent.name).startswith("models--"):
            return name.removeprefix("models--").replace("--", "/", 1)
    return None


def is_cached_repo(path: Path) -> bool:
    """Whether `path` is the folder of a repository in the Hub cache, which contains its snapshots."""
    return path.name.startswith("models--") and (path / "snapshots").is_dir()


def cached_snapshot(root: Path) -> Path:
    """The checkpoint in the folder of a repository in the Hub cache: that of its main branch, else the only one.

    Raises InputError if there are several, or none.
    """
    main = root / "refs" / "main"
    if main.is_file() and (root / "snapshots" / main.read_text("utf-8").strip()).is_dir():
        return _checkpoint(root / "snapshots" / main.read_text("utf-8").strip(), root.name)
    found = sorted(entry for entry in (root / "snapshots").iterdir() if entry.is_dir())
    if len(found) == 1:
        return _checkpoint(found[0], root.name)
    listed = ", ".join(f"snapshots/{entry.name}" for entry in found) or "none"
    raise InputError(
        f"Expected one snapshot in {root}, or its main branch; got {listed}. Give the path of one of them."
    )


def fetch(hub_id: HubId, *, cache_dir: str | Path | None = None, local_files_only: bool = False) -> Path:
    """The checkpoint of a repository in the Hub cache, downloaded unless it is there.

    Only the files of the checkpoint are downloaded (see `select`). Without a connection, the cached version is used.
    Raises InputError for an unknown, private or gated repository, an unknown revision, a repository without a
    checkpoint, no connection and nothing cached, and a full disk.
    """
    from huggingface_hub import constants, snapshot_download

    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    if local_files_only or constants.HF_HUB_OFFLINE:
        return _cached(hub_id, cache, "offline mode is on (local_files_only or HF_HUB_OFFLINE): turn it off")
    try:
        with hub_errors(*hub_id):
            info = api().model_info(hub_id.repo, revision=hub_id.revision, files_metadata=True)
    except UnreachableError as error:
        return _cached(hub_id, cache, str(error))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    chosen, commit = select(sizes, str(hub_id)), info.sha or ""
    if chosen[-1].startswith("unet_ema/") and any(each.startswith("unet/") for each in sizes):
        _log.info("%s: unet_ema, and not unet", hub_id.repo)
    snapshot = cache / f"models--{hub_id.repo.replace('/', '--')}" / "snapshots" / commit
    missing = [name for name in chosen if not (snapshot / name).exists()]
    size = sum(sizes[name] for name in missing)
    _check_space(cache, size, hub_id)
    try:
        downloading = activity(f"Downloading {hub_id}", f"{size / 1e6:,.0f} MB", own_bar=True)
        with hub_errors(*hub_id), progress_bars(shown=bool(missing)), downloading:
            folder = snapshot_download(
                hub_id.repo,
                revision=hub_id.revision,
                cache_dir=cache,
                allow_patterns=[glob.escape(name) for name in chosen],
                endpoint=endpoint(),
            )
    except UnreachableError as error:
        raise InputError(f"The download of {hub_id} was interrupted: {error}, and load it again.") from error
    _log.info("%s: revision %s of %s", hub_id.repo, commit[:12], endpoint())
    return _checkpoint(Path(folder), str(hub_id))


def select(files: Collection[str], name: str) -> list[str]:
    """The files of a repository that belong to its checkpoint.

    A diffusers pipeline (unet_ema is preferred to unet) or network, else a native checkpoint, else the only weights;
    in each folder by the rules of `weight_names.choices`, as of a local folder, but the first of several variants
    (diffusion_pytorch_model.fp16.safetensors). Raises InputError, with `name` for the repository, if there is none.
    """
    for folder in ("unet_ema/", "unet/", ""):
        inside = _inside(files, folder)
        found = weight_names.choices(inside)
        variants = bool(found) and all(each.startswith(_WEIGHTS) for each in found)
        if len(found) > 1 and folder and not variants:
            raise _several(name, [folder + each for each in found])
        if variants or (found and folder):
            configs = ("model_index.json", "cm_jax.json", "scheduler/scheduler_config.json", f"{folder}config.json")
            weights = weight_names.parts(found[0], inside)
            return [*(each for each in configs if each in files), *(folder + each for each in weights)]
    params = [each for each in files if each.startswith("params/")]
    if params and "config.json" in files:
        return [*(each for each in ("config.json", "checksums.json") if each in files), *params]
    return _only_weights(_inside(files, ""), name)


def _inside(files: Collection[str], folder: str) -> list[str]:
    """The names of the files in a folder of the repository, without those in its subfolders."""
    names = [each.removeprefix(folder) for each in files if each.startswith(folder)]
    return [each for each in names if "/" not in each]


def _only_weights(files: list[str], name: str) -> list[str]:
    """The only weights among the files at the top of a repository, with their config."""
    single = [each for each in files if each.lower().endswith(_SINGLE_FILES)]
    single = sorted(each for each in single if weight_names.has_weights(each)) or sorted(single)
    found = weight_names.choices(files)
    if len(found) == 1 and all(each.endswith((".safetensors", ".bin")) for each in single):
        return [*(["config.json"] if "config.json" in files else []), *weight_names.parts(found[0], files)]
    if len(single) == 1:
        return single
    if single:
        raise _several(name, single)
    raise InputError(
        f"{name} has no checkpoint. Expected a diffusers folder (unet/{_WEIGHTS}.safetensors or .bin), a native "
        f"checkpoint, or one .pt, .pkl or .safetensors file; got {', '.join(sorted(files)[:8]) or 'no files'}."
    )


def _several(name: str, checkpoints: list[str]) -> InputError:
    return InputError(
        f"{name} has {len(checkpoints)} checkpoints: {', '.join(checkpoints)}. Download one, for example with "
        f"`hf download {name.replace('@', ' --revision ')} {checkpoints[0]}`, and give the path that it prints."
    )


def _checkpoint(snapshot: Path, name: str) -> Path:
    """The checkpoint in a snapshot: the folder, or the single file in it."""
    files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if not path.is_dir()]
    chosen = [each for each in select(files, name) if each != "config.json"]
    single = len(chosen) == 1 and chosen[0].endswith(_SINGLE_FILES) and "/" not in chosen[0]
    return snapshot / chosen[0] if single and not chosen[0].startswith(_WEIGHTS) else snapshot


def _cached(hub_id: HubId, cache: Path, reason: str) -> Path:
    """The cached checkpoint of a repository. Raises InputError with the reason for not downloading it."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id.repo, revision=hub_id.revision, cache_dir=cache, local_files_only=True, allow_patterns=[]
        )
        found = _checkpoint(Path(folder), str(hub_id))
    except (OSError, InputError) as error:
        state = "is incomplete" if isinstance(error, InputError) else "is not"
        raise InputError(
            f"{hub_id} {state} in the Hub cache {cache}, and cannot be downloaded: {reason}. There is no such local "
            "path either."
        ) from error
    _log.info("%s: cached revision %s, not compared with the Hub (%s)", hub_id.repo, Path(folder).name[:12], reason)
    return found


def _check_space(cache: Path, needed: int, hub_id: HubId) -> None:
    above = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise InputError(
            full_disk(str(hub_id), cache, f"it needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        )
