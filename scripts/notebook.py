"""Run examples/notebook.ipynb anew, in an empty folder, and keep its outputs.

    python scripts/notebook.py [NOTEBOOK]    # after the embedded model changed

Times, progress bars and what a code host does not show are left out.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples/notebook.ipynb"


def run(notebook):
    """Run a notebook in place, in an empty folder. What a cell raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}, record_timing=False).execute()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):  # other forms are for a live page alone
                    output.data = {kind: output.data[kind] for kind in ("image/png", "text/plain")}
    return notebook


def main(file=NOTEBOOK):
    nbformat.write(run(nbformat.read(file, as_version=4)), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
