"""`python -m services.sampler --config FILE`."""

from services.sampler.config import SamplerConfig
from services.sampler.engines.factory import make_engine
from services.sampler.service import SamplerService
from shared.process import main

if __name__ == "__main__":
    main("sampler", SamplerConfig, lambda config, node: SamplerService(config, node, make_engine))
