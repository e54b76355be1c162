"""`python -m services.environment`."""

from services.environment.config import EnvironmentConfig
from services.environment.service import build
from shared.process import main

if __name__ == "__main__":
    main("environment", EnvironmentConfig, build)
