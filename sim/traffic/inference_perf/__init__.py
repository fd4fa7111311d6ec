"""inference-perf's workload file as a workload."""
