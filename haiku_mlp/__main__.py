"""The main job, ``python -m haiku_mlp``: see :mod:`haiku_mlp.masses.command`."""

import sys

from haiku_mlp.masses import command

if __name__ == "__main__":
    sys.exit(command.main())
