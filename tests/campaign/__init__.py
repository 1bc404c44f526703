"""Attacks the commands as a person meets them, and counts what holds: a scorecard.

    python -m tests.campaign                       twenty minutes to an hour on two CPU cores
    python -m tests.campaign --short               two minutes
    python -m tests.campaign --rows R1 R4 --seed 5 --output scorecard.md

Each row (`id | what | tried | passed | silently wrong`) is a family of attacks in a module of its own. "Passed" is the
right state afterwards, one line where an error is due, no traceback, and the exit code that the README names. "Silently
wrong" is exit code 0 and a wrong result. What an attempt does is a function of (seed, row, number), as far as timing
allows; a failure is printed with the flags that repeat it:

    python -m tests.campaign --rows R4 --seed 0 --attempt 17 --keep

Commands run as forks of one process that has imported everything (processes.py), which lets a start cost a tenth of a
second; where a process is the point (torchrun, its ranks' death, flags through a real command line) they are real ones.
Everything is written into a temporary folder; R5 mounts a small tmpfs in it where that is allowed, and limits the size
of files elsewhere.
"""
