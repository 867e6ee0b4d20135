"""Run the notebooks at real size and write them with their outputs: `make notebooks`, or `python notebooks/execute.py 03 08`.

A figure is kept as data for a live notebook and as a picture for where none is run. Of every page that a notebook makes a
picture goes to `notebooks/pictures/`, where the text refers to it.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
WORK = HERE.parent / "runs" / "notebooks"  # kept: training that was there goes on
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def executed(script: Path) -> nbformat.NotebookNode:
    notebook = jupytext.read(script)
    WORK.mkdir(parents=True, exist_ok=True)
    client = nbclient.NotebookClient(
        notebook, timeout=None, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(WORK)}}
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "text/plain" in output.get("data", {}):  # a page in a temporary folder
                output.data["text/plain"] = re.sub(r"/\S+/(?=dashboard\.html)", "", output.data["text/plain"])
            if output.output_type == "stream":  # of a line that was written over, what stood there last
                output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
                output.text = re.sub(r"\S*/ipykernel_\d+/\d+\.py:\d+: |\S*/(?=\w+\.py:\d+: )", "", output.text)
    return notebook


def pages(since: float) -> dict[str, str]:
    """The address of each page that the notebook wrote."""
    return {path.stem: path.as_uri() for path in WORK.rglob("*.html") if path.stat().st_mtime >= since}


def photograph(name: str, found: dict[str, str]) -> None:
    (HERE / "pictures").mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        for stem, address in found.items():
            page.goto(address)
            page.wait_for_timeout(1500)
            page.screenshot(path=HERE / "pictures" / f"{name}-{stem}.png")
        browser.close()


def main(wanted: list[str]) -> None:
    os.environ |= {"PLOTLY_RENDERER": "plotly_mimetype+png", "PYTHONWARNINGS": "ignore:IProgress not found"}
    for script in sorted(path for path in HERE.glob("[0-9]*.py") if not wanted or path.name[:2] in wanted):
        print(script.stem, flush=True)
        WORK.mkdir(parents=True, exist_ok=True)
        (mark := WORK / "mark").touch()
        notebook = executed(script)
        photograph(script.name[:2], pages(mark.stat().st_mtime))
        nbformat.write(notebook, script.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
