#!/usr/bin/env bash
# Test the wheel alone, in an empty environment without PyTorch and TensorFlow.
#   tools/check_wheel.sh [PYTHON ...]     e.g. python3.11 python3.13; default: python3
# Builds the wheel and tests it with each PYTHON: installation, import, sample, train, edit, convert, error messages.
# Needs a package index; takes one to two minutes and 800 MB of $TMPDIR per PYTHON, removed afterwards.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
started="$PWD"
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
pythons=("$@")
[ $# -gt 0 ] || pythons=(python3)

say() { printf '%s\n' "$*"; }
fail() { say "FAILED: $*" >&2 && exit 1; }

# refused MESSAGE COMMAND...: the command must exit with 2 and print MESSAGE, without a traceback.
refused() {
	local message="$1" said code=0
	shift
	said="$("$@" 2>&1)" || code=$?
	[ "$code" = 2 ] || fail "$* exited with $code: $said"
	case "$said" in *Traceback*) fail "$* gave a traceback: $said" ;; esac
	case "$said" in *"$message"*) ;; *) fail "$* printed: $said" ;; esac
}

"${pythons[0]}" -m venv "$place/builder"
"$place/builder/bin/pip" install --quiet --disable-pip-version-check build 2>"$place/pip.log" ||
	{ tail -n 5 "$place/pip.log" >&2 && fail "build cannot be installed"; }
"$place/builder/bin/python" -m build --outdir "$place/dist" "$root" >"$place/build.log" 2>&1 ||
	{ tail -n 20 "$place/build.log" >&2 && fail "the package cannot be built"; }
wheel="$(echo "$place"/dist/*.whl)"
say "$(basename "$wheel"): $(du -k "$wheel" | cut -f1) KiB; $(basename "$place"/dist/*.tar.gz): $(du -k "$place"/dist/*.tar.gz | cut -f1) KiB."

export JAX_PLATFORMS=cpu XDG_CACHE_HOME="$place/cache"
unset PYTHONPATH CM_JAX_INCEPTION CM_JAX_LPIPS
small=(--network.image-size 8 --network.base-channels 16 --network.channel-mult 1 --network.blocks-per-level 1
	--network.dropout 0 --batch-size 8 --log-every 5 --sample-every 20 --ema-decay 0.99)

for python in "${pythons[@]}"; do
	cd "$started"
	env="$place/env" work="$place/work"
	rm -rf "$env" "$work" && mkdir "$work"
	"$python" -m venv "$env" || fail "$python cannot create an environment"
	cd "$work"
	bin="$env/bin"
	before="$(du -sm "$env" | cut -f1)"
	"$bin/pip" install --quiet --disable-pip-version-check "$wheel" 2>"$place/pip.log" ||
		{ tail -n 5 "$place/pip.log" >&2 && fail "the wheel cannot be installed with $python"; }
	after="$(du -sm "$env" | cut -f1)"

	"$bin/python" - <<-'EOF'
		import importlib.metadata, importlib.util, sys
		for name in ("torch", "tensorflow", "diffusers", "gradio", "matplotlib", "convert", "tests", "tools", "benchmarks"):
		    assert importlib.util.find_spec(name) is None, f"{name} was installed"
		tops = {str(file).split("/")[0] for file in importlib.metadata.files("cm_jax")} - {".."}
		assert tops == {"cm_jax", f"cm_jax-{importlib.metadata.version('cm_jax')}.dist-info"}, tops
		import cm_jax
		late = {"tyro", "scipy", "grain", "matplotlib"} & set(sys.modules)
		assert "site-packages" in cm_jax.__file__ and not late, late
	EOF
	seconds="$("$bin/python" - <<-'EOF'
		import statistics, subprocess, sys, time
		def seconds(statement):
		    began = time.perf_counter()
		    subprocess.run([sys.executable, "-c", statement], check=True)
		    return time.perf_counter() - began
		both = [[seconds(f"import {name}") for _ in range(6)][1:] for name in ("jax", "cm_jax")]
		print(" s, of cm_jax ".join(f"{statistics.median(each):.2f}" for each in both))
	EOF
	)"
	say "$("$bin/cm-jax" --version): $((after - before)) MB installed; import of jax $seconds s (median of 5)."

	"$bin/cm-jax" sample >sample.txt && [ -s samples.png ] || fail "sample wrote no image"
	"$bin/cm-jax" train emoji32-edm --images 160 "${small[@]}" >train.txt
	grep -q "^Finished: 20 batches" train.txt || fail "train did not finish: $(tail -n 1 train.txt)"
	"$bin/cm-jax" sample runs/emoji32-edm --steps 2 --output run.png >>sample.txt
	"$bin/cm-jax" edit colorize "$root/docs/images/emoji/cat.png" --labels 2 >edit.txt && [ -s edited.png ] || fail "edit"
	"$bin/cm-jax" convert emoji16_cd native >convert.txt
	"$bin/cm-jax" convert native diffusers --to diffusers >>convert.txt
	"$bin/cm-jax" sample emoji16_cd --output known.png >>sample.txt
	for model in native diffusers; do
		"$bin/cm-jax" sample "$model" --output "$model.png" >>sample.txt
		cmp -s known.png "$model.png" || fail "$model samples other images"
	done
	refused "requires torch, which is not installed" "$bin/cm-jax" convert emoji16_cd other --check
	refused "CM_JAX_INCEPTION is not set" "$bin/cm-jax" evaluate emoji16_cd emoji --count 10
	refused "pip install gradio" "$bin/cm-jax" demo
	refused "There is no command" "$bin/cm-jax" smaple
	for command in sample edit convert train evaluate tune demo; do
		"$bin/cm-jax" "$command" --help >/dev/null || fail "$command --help"
	done
	say "sample, train (20 steps), edit, convert: passed. Commands with missing dependencies fail with one message."
done
