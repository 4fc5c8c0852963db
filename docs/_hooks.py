"""Hooks of the documentation's build: notebooks as pages, and the help of commands as printed."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the notebooks in colab/: each as a page with its saved outputs, and as a download."""
    root = Path(config.docs_dir).parent
    for path in sorted(root.glob("colab/*.ipynb")):
        page, pictures = _notebook(path)
        files.append(File.generated(config, f"colab/{path.stem}.md", content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"colab/{name}", content=picture))
        files.append(File(f"colab/{path.name}", str(root), config.site_dir, False))
    return files


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name.

    The theme then styles its code and its tables as it does on every other page, in light and dark.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    heading = path.stem
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = next(iter(re.findall(r"^#+ (.*)$", source, re.MULTILINE)), heading)
            parts.append(source.replace("](../docs/", "](../"))
            continue
        code = f"```python\n{source}\n```"
        if "pip" in source:  # long, and the same in all of them
            code = f'<details markdown="1"><summary>Install</summary>\n\n{code}\n\n</details>'
        parts.append(code)
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![{heading}]({name})")
            else:
                text = "".join(output.get("text") or data["text/plain"]).rstrip()
                parts.append(f"``` {{.text .output}}\n{text}\n```")
    first, *rest = parts  # the title, and what the notebook is about
    download = f"[Download this notebook]({path.name})"
    return "\n\n".join([first, download, *rest]), pictures


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
