"""A cache of expensive results, saved as each one is computed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Cells:
    """A file with one result per line, so that a run that was killed resumes where it stopped.

    Args:
        path: path of the file; `done` removes it.
        settings: the settings that all results depend on; if they differ, the file is cleared.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.found: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        head = json.dumps(settings, sort_keys=True)
        if lines[:1] != [head]:
            path.write_text(head + "\n", encoding="utf-8")
            return
        for line in lines[1:]:
            try:
                name, value = json.loads(line)
            except ValueError:  # truncated when the run was killed
                break
            self.found[name] = value
        kept = [head, *(json.dumps(item) for item in self.found.items())]
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The result with this name, computed if it is missing."""
        if name not in self.found:
            self.found[name] = make()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, self.found[name]]) + "\n")
        return self.found[name]

    def done(self) -> None:
        """Removes the file."""
        self.path.unlink()
