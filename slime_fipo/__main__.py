"""``python3 -m slime_fipo train.py …``: run a slime train script with ``--loss-type fipo_loss`` in its parser."""

from __future__ import annotations

import sys
from pathlib import Path

from .launch import USAGE, run_script


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(USAGE, file=sys.stderr if len(sys.argv) < 2 or sys.argv[1] not in ("-h", "--help") else sys.stdout)
        sys.exit(0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2)
    script = sys.argv[1]
    if not Path(script).is_file():
        print(f"{USAGE}\nerror: can't open {script}: no such file", file=sys.stderr)
        sys.exit(2)
    run_script(script, sys.argv[2:])


if __name__ == "__main__":
    main()
