"""One self-contained HTML page for a run: what it did, its curves, its dialogues.

The page is made from the run folder alone. All text is escaped by the template engine; dialogues
are data and can put no markup into the page.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normkit.errors import InputError, MissingDependencyError
from normkit.files import write_text
from normkit.runs import read_json, read_table

TEMPLATE = "page.html.j2"


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` of a run folder and return its path.

    Args:
        folder: a run folder with ``config.json`` and ``results.json``; ``plots/*.png`` are shown in
            the order of their names.

    Raises:
        InputError: where the folder lacks the run's files, or they are not a run's.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingDependencyError("jinja2", "report") from None
    folder = Path(folder)
    results = read_json(folder, "results.json")
    if not isinstance(results.get("summary", []), list):
        raise InputError(f"{folder / 'results.json'}: summary must be a list of lines")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("normkit", "report"), autoescape=True, trim_blocks=True
    )
    environment.filters["number"] = number
    plots = [
        (path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode())
        for path in sorted((folder / "plots").glob("*.png"))
    ]
    page = environment.get_template(TEMPLATE).render(
        title=results.get("title", folder.parent.name),
        summary=results.get("summary", []),
        table=results.get("table", {}),
        pairs=read_table(folder, "pairs"),
        plots=plots,
        config=_flat(read_json(folder, "config.json")),
        steps=read_table(folder),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def number(value: Any) -> str:
    """A number with four significant digits; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
