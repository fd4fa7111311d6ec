"""The constants of ``scenarios/gpus``, from NVIDIA's timings of vLLM's kernels."""
