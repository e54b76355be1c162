"""Engines of the sampler. `base` says what one must do, `torch_engine` does it with PyTorch and transformers."""
