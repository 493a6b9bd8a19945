"""The batching policy: which segments make the next step. Plain data in, plain data out."""
