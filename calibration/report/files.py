"""Reports on disk."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from calibration.report.page import report_page
from calibration.report.schema import FORMAT_VERSION, Report
from vllm_offq.errors import UserError

JSON_FILE = "report.json"
HTML_FILE = "report.html"


def write_report(report: Report, folder: str | Path) -> None:
    """Write report.json and report.html. The same report gives the same bytes.

    folder: must exist. Raises: OSError as any write does.
    """
    folder = Path(folder)
    (folder / JSON_FILE).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (folder / HTML_FILE).write_text(report_page(report), encoding="utf-8")


def read_report(path: str | Path) -> Report:
    """The report at a path: a checkpoint's folder or the JSON file itself.

    Raises: UserError, one sentence, where there is none, or none that this version reads.
    """
    path = Path(path)
    file = path / JSON_FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist; give a checkpoint that `offq quantize` of this version wrote, "
            f"or its {JSON_FILE}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    try:
        raw: Any = json.loads(text)
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict) or "format_version" not in raw:
        raise UserError(f"{file} is no report of `offq quantize`; give a {JSON_FILE}")
    version = raw["format_version"]
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{file} has report version {version}, this vllm-offq reads up to {FORMAT_VERSION}; "
            "upgrade vllm-offq"
        )
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "the report"
        raise UserError(f"{file} is damaged, {key}: {problem['msg']}") from None
