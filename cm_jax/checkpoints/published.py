"""Published and bundled checkpoints by name: their settings, and their files.

N and tuned timesteps are those of OpenAI's sampling commands (openai/consistency_models, scripts/launch.sh;
openai/consistency_models_cifar10, launch.sh and its notebook). The names of EDM's and EDM2's files are those of
NVlabs/edm and NVlabs/edm2.
"""

import dataclasses
import functools
import importlib.resources
import os
import re
from pathlib import Path
from typing import Any

from cm_jax.checkpoints import download, hub, native, weight_names
from cm_jax.errors import InputError, nearest

_ASSETS = Path(str(importlib.resources.files("cm_jax.assets")))
_EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
_EDM2_URL = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"
_EDM_LICENSE = "CC BY-NC-SA 4.0, for non-commercial use"
_EMOJI_CLASSES = (
    "Smileys & Emotion/People & Body/Animals & Nature/Food & Drink/Travel & Places/Activities/Objects/Symbols/Flags"
)

BUNDLED = {
    "emoji32": _ASSETS / "emoji32.safetensors",
    "emoji32_edm": _ASSETS / "emoji32_edm.safetensors",
    "emoji16_cd": _ASSETS / "emoji16_cd.pt",
}
"""Files of the bundled checkpoints: emoji32 and the denoiser emoji32_edm were trained with this package, emoji16_cd
with OpenAI's code."""
_OF_RUNS = (".lock", "run.json", "config_history.json")
"""Files that every folder of a training run has some of, and no other folder."""
DEFAULT = "emoji32"
"""The checkpoint that `load` reads by default."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint."""

    name: str
    num_levels: int = 40
    timesteps: tuple[int, ...] = ()
    """Tuned timesteps for two steps, in diffusers' notation; empty where none were published."""
    image_size: int = 32
    parameters: int = 0
    """Parameter count of its network; 0 if unchecked. A file of this name with another count is another checkpoint."""
    head_dim: int = 64
    class_names: tuple[str, ...] = ()
    path: str = ""
    """Path of the file below `address`; by default the name and ".pt"."""
    address: str = download.URL
    license: str = ""

    @property
    def preconditioning(self) -> str:
        return "edm" if self.name.startswith("edm_") else "consistency"

    @property
    def file(self) -> str:
        return self.path or f"{self.name}.pt"

    @property
    def url(self) -> str:
        return download.url_of(self.file, self.address)


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """Names of the 1000 ImageNet classes in the order of their WordNet ids: the numbers of the published networks."""
    return tuple(_ASSETS.joinpath("imagenet_classes.txt").read_text("utf-8").splitlines())


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_IMAGENET = re.compile(r"imagenet|ilsvrc|(?:^|[/\\]|edm2-)(img|in)-?(1k|\d{2,3}(?!\d))", re.I)
"""In the names of data sets and checkpoints: imagenet-64x64.zip, img512-sd.zip, edm2-img64-s."""


def usual_classes(classes: int | None, stem: str = "", data: Any = None) -> tuple[str, ...]:
    """Class names of a network of the EDM family, whose files have none: those of ImageNet or CIFAR-10, or none.

    stem: name of its file, which counts if it is a published one. data: what else states its data set, such as a path;
    where nothing does, 1000 classes are those of ImageNet.
    """
    name = stem if stem in published_edm() or edm2(stem) else data
    name = name if isinstance(name, str) else None
    if classes == 1000 and (name is None or _IMAGENET.search(name)):
        return imagenet_classes()
    return _CIFAR10 if classes == 10 and re.search("cifar-?10(?!0)", name or "", re.I) else ()


@functools.cache
def published() -> dict[str, Published]:
    """OpenAI's twelve PyTorch checkpoints and the bundled one from the same code, by name."""
    imagenet = {"image_size": 64, "parameters": 295_899_267, "class_names": imagenet_classes()}
    lsun: dict[str, Any] = {"image_size": 256, "parameters": 526_304_771}
    known = [
        Published("edm_imagenet64_ema", **imagenet),
        Published("cd_imagenet64_l2", timesteps=(22, 0), **imagenet),
        Published("cd_imagenet64_lpips", timesteps=(22, 0), **imagenet),
        Published("ct_imagenet64", 201, timesteps=(106, 0), **imagenet),
        Published("edm_bedroom256_ema", **lsun),
        Published("cd_bedroom256_l2", timesteps=(18, 0), **lsun),
        Published("cd_bedroom256_lpips", timesteps=(17, 0), **lsun),
        Published("ct_bedroom256", 151, timesteps=(67, 0), **lsun),
        Published("edm_cat256_ema", **lsun),
        Published("cd_cat256_l2", **lsun),
        Published("cd_cat256_lpips", **lsun),
        Published("ct_cat256", 151, timesteps=(62, 0), **lsun),
        Published("emoji16_cd", 18, (8, 0), 16, 1_923_907, head_dim=32, class_names=tuple(_EMOJI_CLASSES.split("/"))),
    ]
    return {entry.name: entry for entry in known}


@functools.cache
def published_cifar10() -> dict[str, Published]:
    """The ten checkpoints of openai/consistency_models_cifar10, by name.

    N of the continuous-time models is that of OpenAI's samplers for them.
    """

    def entry(name: str, step: int | None = None, num_levels: int = 18, timesteps: tuple[int, ...] = ()) -> Published:
        file = f"jcm_checkpoints/{name}" + ("" if step is None else f"/checkpoints/checkpoint_{step}")
        return Published(name, num_levels, timesteps, path=file)

    known = [
        entry("edm_cifar10_ema"),
        entry("cd-l1", 80),
        entry("cd-l2", 80),
        entry("cd-lpips", 80, timesteps=(11, 0)),
        entry("ct-lpips", 74, num_levels=151),
        entry("cifar10-continuous-cd-l2", 40),
        entry("cifar10-continuous-cd-l2-stopgrad", 40),
        entry("cifar10-continuous-cd-lpips-stopgrad", 40),
        entry("continuous-ct-l2", 80),
        entry("continuous-ct-lpips", 40),
    ]
    return {entry.name: entry for entry in known}


@functools.cache
def published_edm() -> dict[str, Published]:
    """The checkpoints of EDM, and of EDM2 those with the best FIDs, by name. `edm2` knows the others."""

    def entry(name: str, parameters: int) -> Published:
        path = f"baseline/{name}.pkl" if name.startswith("baseline-") else f"{name}.pkl"
        return Published(name, parameters=parameters, path=path, address=_EDM_URL, license=_EDM_LICENSE)

    names = {
        **{f"edm-cifar10-32x32-{kind}": 55_700_000 for kind in ("cond-vp", "cond-ve", "uncond-vp", "uncond-ve")},
        **{f"edm-{data}-64x64-uncond-{kind}": 61_800_000 for data in ("ffhq", "afhqv2") for kind in ("vp", "ve")},
        **{f"{kind}-imagenet-64x64-cond-adm": 295_900_000 for kind in ("edm", "baseline")},
        **{f"baseline-cifar10-32x32-{kind}": 61_800_000 for kind in ("cond-vp", "uncond-vp", "uncond-ve")},
        **{f"baseline-{data}-64x64-uncond-ve": 62_800_000 for data in ("ffhq", "afhqv2")},
    }
    best = (
        *("64-s-1073741-0.075", "64-m-2147483-0.060", "64-l-1073741-0.040", "64-xl-0671088-0.040"),
        *("512-xs-2147483-0.135", "512-s-2147483-0.130", "512-m-2147483-0.100", "512-l-1879048-0.085"),
        *("512-xl-1342177-0.085", "512-xxl-0939524-0.070", "512-xs-uncond-2147483-0.045"),
    )
    found = [entry(*item) for item in names.items()] + [edm2(f"edm2-img{name}") for name in best]
    return {entry.name: entry for entry in found if entry}


def edm2(name: str) -> Published | None:
    """EDM2's checkpoint of this name, edm2-DATA-SIZE[-uncond]-KIMG-STD: thousands of images, width of the EMA."""
    if not re.fullmatch(r"edm2-img(64|512)-(xs|s|m|l|xl|xxl)(-uncond)?-\d{7}-0\.\d{3}", name):
        return None
    return Published(name, path=f"{name}.pkl", address=_EDM2_URL, license=_EDM_LICENSE)


def remote() -> dict[str, Published]:
    """Checkpoints that can be downloaded, by name."""
    openai = {name: entry for name, entry in published().items() if name not in BUNDLED}
    return openai | published_cifar10() | published_edm()


def recognize(path: Path) -> Published | None:
    """The published checkpoint whose name a file or folder contains: "ct_cat256.pt", "diffusers-cd_cat256_l2".

    For files and folders in the cache of the Hugging Face Hub, the id counts as well.
    """
    stems = (path.name.removesuffix(".pt").removesuffix(".bin"), path.resolve().name, hub.cached_id(path) or "")
    matches = [entry for name, entry in published().items() if any(name in stem for stem in stems)]
    return max(matches, key=lambda entry: len(entry.name), default=None)


def recognize_cifar10(path: Path) -> Published | None:
    """The published CIFAR-10 checkpoint with the name of a file or of its folder ("cd-l2/checkpoints/...").

    The whole name must match, because these names are short.
    """
    parts = [part for spelling in (path.absolute(), path.resolve()) for part in spelling.parts[-3:]]
    return next((entry for name, entry in published_cifar10().items() if name in parts or name == path.stem), None)


def resolve(
    path_or_name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    download: bool = False,
) -> Path:
    """The checkpoint of a path, of a bundled or published name, or of an id of the Hugging Face Hub.

    The folder of a training run stands for its latest checkpoint, and RUN/best for the best of those evaluated. A path
    has precedence. Ids ("owner/name", "owner/name@revision") are downloaded unless they are cached (see `hub.fetch` for
    the options); published checkpoints only with `download`. Raises InputError where there is no such checkpoint.
    """
    if not isinstance(path_or_name, str | os.PathLike):
        raise InputError(f"Expected the path or the name of a checkpoint, got {path_or_name!r}.")
    name, found = str(path_or_name), _local(path_or_name)
    hub_id = hub.parse_id(path_or_name) if isinstance(path_or_name, str) and not found else None
    if (revision or cache_dir) and not hub_id:
        raise InputError(f"revision and cache_dir apply to ids of the Hugging Face Hub (owner/name), got {name}.")
    if hub_id:
        if revision and hub_id.revision not in (None, revision):
            raise InputError(f"Expected one revision, got {name} and revision={revision!r}.")
        hub_id = hub.HubId(hub_id.repo, revision or hub_id.revision)
        return hub.fetch(hub_id, cache_dir=cache_dir, local_files_only=local_files_only)
    return found or _named(name, fetch=download and not local_files_only)


def _local(path_or_name: str | Path) -> Path | None:
    """The checkpoint of a path, if it exists."""
    try:
        path = Path(path_or_name).expanduser()
        if (path / "checkpoints").is_dir() and not native.is_checkpoint(path):
            if found := native.run_checkpoints(path):
                return found[max(found)]
            if any((path / name).exists() for name in _OF_RUNS):
                raise InputError(f"The run in {path} has no checkpoint yet: continue its training first.")
            return _only_file(path)
        if path.name == "best" and (path.parent / "checkpoints").is_dir() and not path.exists():
            run, step = path.parent, native.best_checkpoint(path.parent)
            if step is None:
                raise InputError(f"No checkpoint of {run} has been evaluated (--evaluation); use {run} itself.")
            found = native.run_checkpoints(run)
            if step not in found:
                raise InputError(f"The best checkpoint of {run}, at step {step}, has been deleted; use {run} itself.")
            return found[step]
        if hub.is_cached_repo(path):
            return hub.cached_snapshot(path)
        return path if path.is_file() or path.is_dir() else None
    except (OSError, RuntimeError) as error:
        raise InputError(f"{str(path_or_name)[:80]} cannot be a path: {error}.") from error


def _only_file(path: Path) -> Path:
    """The only file in PATH/checkpoints, as of OpenAI's CIFAR-10 models; `path` if it holds weights itself, or nothing.

    Raises InputError if there are several.
    """
    names = [entry.name for entry in path.iterdir()]
    others = any(name.startswith(("unet", "model_index.")) or name.endswith((".pt", ".pth")) for name in names)
    files = sorted(entry for entry in (path / "checkpoints").iterdir() if entry.is_file() and entry.name[0] != ".")
    if others or weight_names.choices(names) or not files:
        return path
    if len(files) > 1:
        raise InputError(
            f"{path} holds {len(files)} checkpoints; give the path of one of them, for example {files[-1]}."
        )
    return files[0]


def _named(name: str, *, fetch: bool) -> Path:
    """The checkpoint of a bundled or published name."""
    if name in BUNDLED:
        return BUNDLED[name]
    stem = name.removesuffix(".pt").removesuffix(".pkl")
    if entry := remote().get(stem) or edm2(stem):
        if fetch or download.stored(entry.file).is_file():
            return download.download(entry.file, entry.address)
        license = f" License: {entry.license}." if entry.license else ""
        raise InputError(
            f"{name} is a published checkpoint that has not been downloaded: run `cm-jax download {entry.name}`, or "
            f"cm_jax.load with download=True. It is at {entry.url}.{license}"
        )
    owner = name.partition("/")[0]
    if hub.split_id(name) and os.path.lexists(owner):
        raise InputError(
            f"There is no checkpoint {name}, and it is not an id of the Hugging Face Hub, because {owner} exists here. "
            "Give an existing path, or run the command in another folder."
        )
    raise InputError(
        f"There is no checkpoint {name}. Expected a native checkpoint, a .pt or .pkl file, a diffusers folder, a "
        "checkpoint of openai/consistency_models_cifar10, an id of the Hugging Face Hub (owner/name), or the name of a "
        f"bundled ({', '.join(BUNDLED)}) or published checkpoint.{nearest(name, BUNDLED | remote())}"
    )
