"""Every command ends with status 141 and without a traceback when the reader of its output has gone (`| head`)."""

import json
import os
import subprocess
import sys

from tests.support import ROOT

SCRIPT = """
import json, os, sys
from cm_jax import cli

def ended(words, closed):
    '''(exit status, output) of a command of which one stream is a closed pipe and the other is read.'''
    readers, writers = zip(os.pipe(), os.pipe())
    os.close(readers[0])
    if not (child := os.fork()):
        os.dup2(writers[0], closed)
        os.dup2(writers[1], 3 - closed)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
        try:
            cli.main(words)
        except SystemExit as error:
            sys.stdout.flush()
            os._exit(error.code)
        finally:  # after a traceback
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    for end in writers:
        os.close(end)
    with open(readers[1]) as text:
        output = text.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output

commands = [[], *([name] for name in cli._COMMANDS), ["edit", "inpaint"], ["train", "emoji32-cd"]]
for words in commands:
    print(json.dumps([*words, "--help", *ended([*words, "--help"], closed=1)]))
    print(json.dumps([*words, "--nonsense", *ended([*words, "--nonsense"], closed=2)]))
print(json.dumps(["download", *ended(["download"], closed=1)]))
"""


def test_help_errors_and_output_into_a_closed_pipe():
    own = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=own, capture_output=True, text=True, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) >= 23
    assert [result for result in results if result[-2:] != [141, ""]] == []
