"""What the torch engines of sampler and trainer share: models, adapters, packing, losses. Only engines import it."""
