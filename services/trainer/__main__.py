"""`python -m services.trainer --config FILE`."""

from services.trainer.config import TrainerConfig
from services.trainer.engines.factory import make_engine
from services.trainer.service import TrainerService
from shared.process import main

if __name__ == "__main__":
    main("trainer", TrainerConfig, lambda config, node: TrainerService(config, node, make_engine))
