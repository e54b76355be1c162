"""`python -m services.coordinator --config FILE`."""

from services.coordinator.config import CoordinatorConfig
from services.coordinator.service import CoordinatorService
from shared.process import main

if __name__ == "__main__":
    main("coordinator", CoordinatorConfig, CoordinatorService)
