"""What a run leaves for its reader: plots and one self-contained HTML page."""

from tiltflow.report.html import write_report
from tiltflow.report.record import STATUSES, RunRecord, Status, SummaryRow, VerdictLine

__all__ = ["STATUSES", "RunRecord", "Status", "SummaryRow", "VerdictLine", "write_report"]
