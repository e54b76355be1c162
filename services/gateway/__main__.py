"""`python -m services.gateway --config FILE`."""

import uvloop

from services.gateway.config import GatewayConfig
from services.gateway.service import GatewayService
from shared.process import main

if __name__ == "__main__":
    main("gateway", GatewayConfig, GatewayService, loop_factory=uvloop.new_event_loop)
