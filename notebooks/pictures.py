"""Gives every plotly figure of an executed notebook a picture beside it, for viewers that draw no figures (GitHub's).

    python notebooks/pictures.py notebooks/03_three_allocations.ipynb ...

When each cell ran is dropped, so that a notebook that says the same shows no difference. Needs chromium on the path;
`make notebooks` executes all notebooks and then runs this.
"""

import base64
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from plotly import graph_objects, io

FIGURE = "application/vnd.plotly.v1+json"
WIDTH, HEIGHT = 900, 450


def main(paths: list[str]) -> int:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("Error: there is no chromium on the path; install it, it draws the pictures", file=sys.stderr)
        return 1
    for path in map(Path, paths):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
        figures = [output["data"] for output in outputs if FIGURE in output.get("data", {})]
        for data in figures:
            data["image/png"] = base64.b64encode(picture(data[FIGURE], chromium)).decode() + "\n"
        for cell in notebook["cells"]:
            cell["metadata"].pop("execution", None)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: {len(figures)} pictures")
    return 0


def picture(spec: dict[str, Any], chromium: str) -> bytes:
    """A figure as PNG."""
    height = spec["layout"].get("height", HEIGHT)
    figure = graph_objects.Figure(data=spec["data"], layout=spec["layout"] | {"width": WIDTH, "height": height})
    with tempfile.TemporaryDirectory() as folder:
        page, png = Path(folder, "page.html"), Path(folder, "picture.png")
        body = io.to_html(figure, full_html=False, include_plotlyjs=True, config={"staticPlot": True})
        page.write_text(f"<!doctype html><meta charset=utf-8><body style='margin:0'>{body}", encoding="utf-8")
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000",
            f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{height}", f"--screenshot={png}",
            page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, capture_output=True, check=True, timeout=60)
        return png.read_bytes()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
