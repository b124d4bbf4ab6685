"""`download`: download a published checkpoint, or list them."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from cm_jax.checkpoints import download, published
from cm_jax.cli.parsing import parse
from cm_jax.cli.running import say


@dataclasses.dataclass(frozen=True)
class Download:
    """Download a published checkpoint of OpenAI, EDM or EDM2, or a model of the Hugging Face Hub.

    Afterwards the name alone loads it: `cm-jax sample NAME`. An interrupted download of a published checkpoint is
    resumed by the same command. OpenAI's model card restricts its weights to research; those of EDM and EDM2 are
    licensed under CC BY-NC-SA 4.0, for non-commercial use.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ""
    """Name of a published checkpoint, or OWNER/NAME on the Hub. Default: list the published checkpoints."""
    force: bool = False
    """Download a published checkpoint again, although it is stored already."""


def main(prog: str, words: Sequence[str]) -> None:
    """Download one checkpoint, or list all."""
    args = parse(Download, prog, words)
    if name := args.name:
        if args.force and (entry := published.remote().get(name)):
            download.download(entry.file, entry.address, force=True)
        say(f"{name} is at {published.resolve(name, download=True)}")
        return
    say(f"Published checkpoints, stored in {download.stored('')} by `{prog} NAME`:")
    for name, entry in published.remote().items():
        path = download.stored(entry.file)
        bytes_ = path.stat().st_size if path.is_file() else 4 * entry.parameters
        size = f"{bytes_ / 1e9:.1f} GB" if bytes_ else "unknown"
        say(f"  {name:36}{size:>10}{'  downloaded' if path.is_file() else ''}".rstrip())
