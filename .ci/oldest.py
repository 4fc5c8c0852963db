"""Prints the oldest versions that pyproject.toml admits, as constraints for pip.

With names of extras as arguments, their dependencies too: `python .ci/oldest.py test train`.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
todo = [*project["dependencies"], *(f"{project['name']}[{extra}]" for extra in sys.argv[1:])]
bounds = {}
for requirement in todo:  # grows while it is read: an extra may name others
    if own := re.fullmatch(rf"{project['name']}\[(.+)\]", requirement):
        for extra in own[1].split(","):
            todo += project["optional-dependencies"][extra]
    elif bound := re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement):
        # A package that is named twice must be named with one bound, or one of them is not true.
        if bounds.setdefault(bound[1], bound[2]) != bound[2]:
            sys.exit(f"{bound[1]} has two lower bounds, {bounds[bound[1]]} and {bound[2]}")
    else:
        sys.exit(f"no lower bound that this script can read: {requirement}")
print("\n".join(f"{name}=={version}" for name, version in sorted(bounds.items())))
