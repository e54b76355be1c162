"""`python -m services.autoscaler`."""

from services.autoscaler.config import AutoscalerConfig
from services.autoscaler.service import build
from shared.process import main

if __name__ == "__main__":
    main("autoscaler", AutoscalerConfig, build)
