"""Hostile input, by the thousand: damaged files for every reader, nonsense for every command line, and code in pickles.

    python -m tools.fuzz --seconds 600 --seed 1

Every input must be used, or refused with one InputError (a command: one line and exit status 2). Anything else is a
fault: another exception, code that ran, a file left behind or changed, memory or time without bound. An input is a
function of the seed, the target's name and its number, so that a fault can be had again:

    python -m tools.fuzz --seed 1 --targets openai --number 417

    damage.py    what is done to files
    payloads.py  pickles that would run code, and leave a file behind if they did
    seeds.py     small good files of every kind
    readers.py   the readers, and how each one's files are damaged
    commands.py  command lines
    watching.py  whether an input was used, refused, or is a fault
"""
