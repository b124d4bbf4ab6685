"""Upload of checkpoints to the Hugging Face Hub."""

import logging
import tempfile
from pathlib import Path
from typing import Literal, TypedDict, Unpack

from cm_jax.checkpoints.hub import split_id
from cm_jax.checkpoints.hub_client import api, hub_errors
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion.model_card import model_card
from cm_jax.conversion.write import write
from cm_jax.errors import InputError
from cm_jax.types import Params, leaves

_log = logging.getLogger(__name__)


class UploadOptions(TypedDict, total=False):
    """Options of an upload."""

    private: bool | None
    """Visibility of a new repository; by default that of the account."""
    token: str | None
    """By default HF_TOKEN, or the token of `hf auth login`."""
    license: str
    """License of the model, as an identifier of the Hub such as apache-2.0; by default the card has no license."""


class PushOptions(UploadOptions, total=False):
    """Options of `Model.push_to_hub`."""

    to: Literal["diffusers", "native"] | None
    """diffusers: a ConsistencyModelPipeline. native: one .safetensors file. By default diffusers if it can represent
    the model."""


def push(repo_id: str, config: ModelConfig, params: Params, **options: Unpack[PushOptions]) -> str:
    """Upload a model with its card, and return the address of the commit.

    Raises InputError as `upload` does, and where diffusers was chosen and cannot represent the model.
    """
    to = options.pop("to", None)
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="cm_jax-") as folder:
        path = _write(Path(folder), config, params, to)
        return upload(repo_id, path, config, params, **options)


def _write(folder: Path, config: ModelConfig, params: Params, to: str | None) -> Path:
    if to == "diffusers" or (to is None and config.distilled):
        try:
            write(folder / "diffusers", "diffusers", config, params)
            return folder / "diffusers"
        except InputError:
            if to:
                raise
    write(folder / "model.safetensors", "native", config, params)
    return folder / "model.safetensors"


def upload(repo_id: str, path: Path, config: ModelConfig, params: Params, **options: Unpack[UploadOptions]) -> str:
    """Upload the files of a checkpoint with a model card in one commit, and return the address of the commit.

    Creates the repository if it does not exist; keeps a README.md that it has. Raises InputError for an invalid id or
    license, without permission to write, and without a connection.
    """
    from huggingface_hub import CommitOperationAdd

    root = path if path.is_dir() else path.parent
    files = sorted(each for each in root.rglob("*") if each.is_file()) if path.is_dir() else [path]
    added = [CommitOperationAdd(each.relative_to(root).as_posix(), each) for each in files]
    count, pipeline = sum(leaf.size for _, leaf in leaves(params)), (path / "model_index.json").is_file()
    card = model_card(repo_id, config, count, pipeline=pipeline, license=options.get("license", ""))
    client = api(options.get("token"))
    with hub_errors(check_repo_id(repo_id)):
        client.create_repo(repo_id, private=options.get("private"), exist_ok=True)
        if client.file_exists(repo_id, "README.md"):
            _log.info("%s has a README.md already; it was kept.", repo_id)
        else:
            added.append(CommitOperationAdd("README.md", card.encode()))
        try:
            commit = client.create_commit(repo_id, added, commit_message="Upload a model with cm_jax")
        except ValueError as error:  # the metadata of the card are invalid
            if isinstance(error, OSError):
                raise
            raise InputError(f"{repo_id} refuses the model card: {' '.join(str(error).split())[:300]}") from error
    return str(commit.commit_url)


def check_repo_id(repo_id: str) -> str:
    """`repo_id`. Raises InputError unless it is "owner/name"."""
    parsed = split_id(repo_id)
    if parsed is None or parsed.revision:
        raise InputError(f"Expected the id of a repository on the Hugging Face Hub, as in owner/name; got {repo_id!r}.")
    return repo_id
