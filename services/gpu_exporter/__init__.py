"""Exports the GPUs of one machine under the names and labels of NVIDIA's DCGM exporter, where that one is not there."""
