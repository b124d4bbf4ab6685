"""Malformed and unusual values of command-line options."""

import random

# fmt: off
PATHS = (
    "nothing.pt", "picture.png/below", "native", "folder", "run", "run/best", "openai.pt", "picture.png", "images.npz",
    "", ".", "..", "/", "//", "/dev/null", "/dev/full", "/proc/self/mem", "/proc/self/nothing.png", "~", "~nobody/x",
    "~/nothing", "x" * 300, "a/" * 2000 + "b", "emoji16_cd", "cd_imagenet64_l2", "new/deep/x.png", "empty", "a\nb.png",
    "\udcff\udcfe.png", "\x1b[2J.png", "näh.png", "-", "--", "-x", "*.png", "$(touch CANARY)", "`touch CANARY`",
    "fifo", "loop", "dangling", "%s%n", "emoji:held_out", "emoji:x", "tfds:nothing", "tfds:", "lpips.safetensors",
    "native.safetensors",
)
NUMBERS = (
    "0", "1", "2", "3", "-1", "8", "17", "18", "1e3", "1.5", "nan", "inf", "-inf", "1e39", "1e400", "0x10", "1_000",
    " 1", "٣", "²", "9" * 30, "9" * 5000, "4294967296", "1000000000", "2147483648", "-2147483649", "True", "None",
    "1,2", "",
)
LISTS = (
    "8,0", "0,8,17", "80,1.38", "0,1,2", "1,,2", ",", "8;0", "1.5,0", "nan,1", "80,nan", "inf,80", "-1,0",
    "1" + ",1" * 20_000, "king penguin", "a", "all", "ALL", "a,b", "zz", "\u202e", "3", "fid", "fid,kid", "bpd",
    "fid,,", "pr,prdc,is", "3,8", "0,0,8,8", "8,8,0,0", "-1,0,4,4", "0,0,999999999999,4", "1e3,0,0,0",
    "9" * 400 + ",0",
)
WORDS = (
    "--help", "-h", "--", "-", "---", "--=", "=", "--x=1", "--seed", "--seed=", "--no-check", "--labels", "--count=4",
    "sample", "inpaint", "emoji32-edm", "@file", "\\", "'", '"', ";", "|", "", "\x1b]0;x\x07", "😀", "--séed",
    "--Seed", "--network.base-channels", "--network.nothing", "--objective", "--network", "--..", "--.", "--settings",
    "--options.run",
)
# fmt: on


def malformed_value(rng: random.Random) -> str:
    """A malformed or unusual value for any option."""
    return rng.choice(rng.choice([PATHS, NUMBERS, NUMBERS, LISTS, WORDS]))
