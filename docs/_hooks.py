"""Hooks of the documentation's build: the help of each command, as the program prints it."""

import os
import re
import subprocess
import sys
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts ``selcrypt COMMAND --help`` where a page says ``<!-- help COMMAND -->``."""
    return re.sub(r"<!-- help (\w+) -->", lambda match: _help(match[1]), markdown)


def _help(command: str) -> str:
    text = subprocess.run(
        [sys.executable, "-m", "selcrypt_jax", command, "--help"],
        capture_output=True,
        check=True,
        env={**os.environ, "COLUMNS": "88", "NO_COLOR": "1"},
        text=True,
    ).stdout
    return f"```text\n{text.strip()}\n```"
