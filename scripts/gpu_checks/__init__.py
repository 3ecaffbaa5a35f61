"""The parts of ``scripts/gpu_check``, one group a file."""
