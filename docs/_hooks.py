"""Hooks of the documentation's build: notebooks, and the help of commands as they print it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files


@event_priority(100)  # before the plugin that reads notebooks
def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Takes the notebooks in, from where they lie for Colab."""
    root = Path(config.docs_dir).parent
    for path in sorted(root.glob("colab/*.ipynb")):
        name = path.relative_to(root).as_posix()
        files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files


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
