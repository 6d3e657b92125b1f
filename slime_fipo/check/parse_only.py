"""A train script that only parses, as slime's ``train.py`` does first, and writes the namespace to ``$PARSED``."""

import json
import os

from slime.utils.arguments import parse_args

if __name__ == "__main__":
    args = parse_args()
    with open(os.environ["PARSED"], "w") as file:
        json.dump({name: repr(value) for name, value in sorted(vars(args).items())}, file)
