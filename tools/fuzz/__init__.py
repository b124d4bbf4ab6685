"""Fuzzing of all readers and commands: damaged files, pickles that contain code, malformed command lines.

    python -m tools.fuzz --seconds 600 --seed 1

Each input must be used, or refused with one InputError (a command: one message and exit status 2). Anything else is a
fault: another exception, executed code, an unexpected file, too much memory or time. The message of a fault names a
folder with the files of its input. Seed, target and number determine the damage to a valid file, and a command line:

    python -m tools.fuzz --seed 1 --targets openai --number 417

Some valid files, such as native folders with their random names, differ from process to process.

    targets.py   what is fuzzed: readers, their files and what they may write
    commands.py  what is fuzzed: command lines
    seeds.py     small valid files of every kind
    damage.py    damage to a file of any kind
    payloads.py  pickles that would execute code and create a file
    runner.py    tries inputs, and classifies them as used, refused or fault
"""
