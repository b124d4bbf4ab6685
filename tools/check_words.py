"""Report retired terms and British spelling in prose: `python -m tools.check_words [PATH...]`.

Checks Markdown, the Markdown cells of notebooks, and the comments, docstrings and messages of Python files. A string
without a space counts as an identifier and is skipped. Without paths it checks every file that git tracks, except the
tests. Prints `file:line: term -> use`, and exits with 1 if it finds any.
"""

import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {"tools/check_words.py", "tests/laws/test_check_words.py"}
"""Files that have to contain the terms."""

TERMS = {
    # how to write
    r"(?<!hand-)(draws?|drew|drawn|drawings?)(?! (uniformly|from (a|the) ([\w-]+ )*distribution))": "sample",
    r"(?<![/-])(?<!prove )(?<!power )laws?(?!/)": "distribution (of noise levels); property (that a test proves)",
    r"judge[sd]?|judging": "feature extractor, metric network; evaluate",
    r"(?<!wall )(?<!wall-)clocks?(?! (speed|rate|frequency|cycle))": "noise conditioning, time embedding",
    r"told|tells?": "conditioned on, given; describe, say",
    r"(?<!standard )(?<!squared )(?<!absolute )deviations?": "standard deviation",
    r"(go|goes|went|going|gone) on": "resume, continue",
    r"(begin|begins|began|begun|beginning) with": "initialize from, start with",
    r"starts? from (published|EDM2?|random|the weights|(a|the) (run|teacher|denoiser|checkpoint))": "initialize from",
    r"tables? of classes": "class-embedding table",
    r"(level|block|network|layer)s? (halve|double)s?|(halve|double)s? the (image|resolution)": "downsample, upsample",
    r"an own": "your own, a custom",
    r"(beside|next to) (PyTorch|diffusers|optax|JAX)'s": "than PyTorch, compared with PyTorch",
    r"the original(?! (image|picture|size|file|order|paper|dtype|value|array|key|name))": "OpenAI's implementation",
    r"ours|theirs|others'": "native; third-party",
    r"by hand": "manually",
    r"at hand": "available",
    r"to the (last )?bit|bit for bit|(in )?every bit|the same bits": "bitwise identical",
    r"half[- ]written": "incomplete, partial",
    r"written beside": "written atomically",
    r"a (third|quarter|fifth|sixth|eighth|tenth|hundredth) (less|more|of|faster|slower|longer)": "a percentage",
    r"what one does|so many|whoever|whomever|for want of|thereof": "a plain statement",
    r"wanted": "expected",
    r"(it|that|which|network|model|program|command|loop|step|test) (knows?|wants?|sees|speaks)": "a plain verb",
    r"scalings": "preconditioning",
    r"repaint\w*": "stroke",
    # names
    r"Karras(Grid|Curve)|(Index|Interval)Law|(EDM|Boundary|TrigFlow|Flow|Variance)Scaling": "a current name",
    r"(Fixed|Adaptive|Target)Rate|(Exponential|Power)Average|Untold|TeacherStep|interval_clock": "a current name",
    r"noise_laws|noise_levels|npz_files|weight_files|head_width|most_skipped|written_beside": "a current name",
    r"cm_jax[./](native|bundled|arrays|settings|checked|files|images|perceptual|config|generation)": "a current path",
    r"CM_JAX_NATIVE": "CM_JAX_KERNELS",
    r"--to ours": "--to native",
    # British spelling
    r"((re)?material|(re)?colou?r|initial|normal|optim|minim|maxim|quant|linear)is(e[drs]?|ing|ations?)": "-ize",
    r"(factor|serial|random|regular|standard|parametr|parallel|vector|local|visual)is(e[ds]?|ing|ations?)": "-ize",
    r"(discret|synchron|summar)is(e[ds]?|ing|ations?)": "-ize",
    r"(recogn|organ|real|general|special|stabil|final|penal|categor|util)is(e[ds]?|ing|ations?)": "-ize",
    r"learnt|spelt|burnt|spoilt": "learned, spelled, burned, spoiled",
    r"grey\w*|licences?": "gray, license",
}
FLAGS = {
    r"half": "--fp16",
    r"start": "--init-from",
    r"accumulate": "--grad-accum-steps",
    r"scalings?": "--preconditioning",
    r"levels": "--num-levels",
    r"averages": "--ema-decay",
    r"power-averages": "--power-ema",
    r"most-skipped": "--max-consecutive-skips",
    r"head-width": "--head-dim",
}
PATTERNS = [(re.compile(rf"(?<![\w])(?:{term})(?![\w])", re.IGNORECASE), use) for term, use in TERMS.items()]
PATTERNS += [(re.compile(rf"(?<![\w-])--{flag}(?![\w.-])"), use) for flag, use in FLAGS.items()]
TARGETS = re.compile(r"\]\([^)\s]*\)|https?://\S+")
"""Link targets and addresses, which are not prose."""


def markdown(text: str) -> Iterator[tuple[int, str]]:
    return enumerate(text.splitlines(), 1)


def python(source: str) -> Iterator[tuple[int, str]]:
    """Comments and strings of more than one word, line by line."""
    parts = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in parts and " " in token.string.strip():
            text = re.sub(r"\{[^{}]*\}", "", token.string) if token.string[0] in "fF" else token.string
            yield from enumerate(text.splitlines(), token.start[0])


def notebook(text: str) -> Iterator[tuple[int, str]]:
    """Markdown cells; a line's number is its place among the lines of these cells."""
    cells = json.loads(text)["cells"]
    return markdown("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"))


READERS = {".md": markdown, ".py": python, ".ipynb": notebook}


def findings(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, term, what to use instead), for each retired term in a file."""
    for number, line in READERS[path.suffix](path.read_text("utf-8")):
        line = TARGETS.sub("]", line)
        for pattern, use in PATTERNS:
            for match in pattern.finditer(line):
                yield number, match[0], use


def tracked() -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [ROOT / name for name in names if not name.startswith("tests/")]


def main(words: list[str]) -> int:
    given = [Path(word).resolve() for word in words] or tracked()
    paths = [file for path in given for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    found = 0
    for path in paths:
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        if path.suffix in READERS and path.is_file() and name not in SKIPPED:
            for number, term, use in findings(path):
                print(f"{name}:{number}: {term} -> {use}")
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
