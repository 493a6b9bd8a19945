"""Exact bytes: what each device of a plan holds, and how much KV room is left. One arithmetic for planner and workers.

(The functions below are filled in by their owner; see the docstrings for the contract.)
"""
