"""What `benchmarks/planner.py` measures, one module a section."""
