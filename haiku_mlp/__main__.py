"""The main job, ``python -m haiku_mlp``: see :mod:`haiku_mlp.masses.command`."""

import os
import sys

from haiku_mlp.masses import command


def _run() -> int:
    try:
        return command.main()
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # ASCII has no frames
    try:
        sys.exit(_run())
    except BrokenPipeError:  # the reader has seen enough, as in "| head -1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        sys.exit(1)
