"""Fuzzing of all readers and commands: damaged files, malformed command lines, pickles that contain code.

    python -m tools.fuzz --seconds 600 --seed 1

Each input must be used, or refused with one InputError (a command: one line and exit status 2). Anything else is a
fault: another exception, executed code, an unexpected file, too much memory or time. Seed, target name and number
determine an input, so a fault can be reproduced:

    python -m tools.fuzz --seed 1 --targets openai --number 417

    damage.py    mutations of bytes, JSON, zip archives, .npy and .safetensors
    mutations.py mutations of files in a folder
    payloads.py  pickles that would execute code and create a file
    seeds.py     small valid files of every kind
    readers.py   readers and the mutations of their files
    commands.py  command lines
    values.py    malformed values of options
    runner.py    the loop over all targets
    outcomes.py  classification: used, refused or fault
"""
