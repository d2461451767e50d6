"""What a run leaves for its reader: plots and one self-contained HTML page."""

from tiltflow.report.figures import history_figures, training_blocks
from tiltflow.report.page import (
    Block,
    Figure,
    Figures,
    Gallery,
    Markup,
    Page,
    Picture,
    Table,
    render,
    require_report,
    write_page,
)
from tiltflow.report.samples import gallery
from tiltflow.report.tables import scores_table, ways_table

__all__ = [
    "Block", "Figure", "Figures", "Gallery", "Markup", "Page", "Picture", "Table", "gallery", "history_figures",
    "render", "require_report", "scores_table", "training_blocks", "ways_table", "write_page",
]  # fmt: skip
