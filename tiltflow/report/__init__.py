"""What a run leaves for its reader: plots and one self-contained HTML page."""

from tiltflow.report.html import write_report
from tiltflow.report.record import RunRecord, SummaryRow
from tiltflow.verdict.line import STATUSES, Line, Status

__all__ = ["STATUSES", "Line", "RunRecord", "Status", "SummaryRow", "write_report"]
