"""What a calibration run did: `report.json` for machines, `report.html` for people."""

from calibration.report.files import HTML_FILE, JSON_FILE, read_report, write_report
from calibration.report.schema import (
    BasisCandidate,
    Histogram,
    Histograms,
    Refinement,
    Report,
    Spectrum,
    size_kind,
)

__all__ = [
    "HTML_FILE",
    "JSON_FILE",
    "BasisCandidate",
    "Histogram",
    "Histograms",
    "Refinement",
    "Report",
    "Spectrum",
    "read_report",
    "size_kind",
    "write_report",
]
