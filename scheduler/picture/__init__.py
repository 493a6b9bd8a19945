"""Pictures of plans: a self-contained page, and a chart. matplotlib is only needed for the chart."""

from hexgen.scheduler.picture.page import page, write_page
from hexgen.scheduler.picture.plot import check_plot, write_plot

__all__ = ["check_plot", "page", "write_page", "write_plot"]
