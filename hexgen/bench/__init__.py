"""Load on a running server, and what its clients met (TTFT, TPOT, throughput), beside what was predicted."""
