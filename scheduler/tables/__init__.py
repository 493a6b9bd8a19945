"""Sources of figures beside the catalogue: published tables and measured ones, behind one contract."""

from hexgen.scheduler.tables.files import load_table, table_for
from hexgen.scheduler.tables.source import CostTable

__all__ = ["CostTable", "load_table", "table_for"]
