"""One HTML file that shows what was measured: charts, tables and pictures in, a page out; it knows no run and no model.

The page needs no network and no server. Charts are SVG, which Vega-Lite draws when the page is written: their numbers
show on hover, on touch and by the arrow keys with a few lines of script of our own (``page.js``).
"""

from star_trainer.report.charts import Line, intervals, lines
from star_trainer.report.images import colour_range
from star_trainer.report.page import (
    ALL_WORDS,
    MOST_PROMPTS,
    Charts,
    Denoising,
    Link,
    Pairs,
    Section,
    Table,
    markdown_tables,
    page,
)

__all__ = [
    "ALL_WORDS", "MOST_PROMPTS", "Charts", "Denoising", "Line", "Link", "Pairs", "Section", "Table", "colour_range",
    "intervals", "lines", "markdown_tables", "page",
]  # fmt: skip
