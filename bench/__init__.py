"""Benchmarks of fastattn against PyTorch's SDPA and other CPU attention kernels: `python -m bench --help`."""
