"""Workloads: what the cluster will be asked to do, read from and written to files and traces."""

from hexgen.workload_file import load_workload, parse_workload, workload_to_dict
from hexgen.workload_spec import Lengths, Slo, Workload

__all__ = ["Lengths", "Slo", "Workload", "load_workload", "parse_workload", "workload_to_dict"]
