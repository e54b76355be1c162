"""`python -m services.reward`."""

from services.reward.config import RewardConfig
from services.reward.service import build
from shared.process import main

if __name__ == "__main__":
    main("reward", RewardConfig, build)
