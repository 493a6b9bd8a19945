"""Other engines beside ours, on the same weights, and the races between them: see ``benchmarks/engine.py``."""
