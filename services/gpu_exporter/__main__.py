"""`python -m services.gpu_exporter`."""

from services.gpu_exporter.config import GpuExporterConfig
from services.gpu_exporter.nvml import open_driver
from services.gpu_exporter.service import GpuExporterService
from shared.process import main

if __name__ == "__main__":
    main("gpu_exporter", GpuExporterConfig, lambda config, node: GpuExporterService(config, node, open_driver))
