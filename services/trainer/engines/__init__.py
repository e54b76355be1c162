"""Engines of the trainer. `base` says what one must do, `torch_engine` does it with PyTorch and transformers.

torch_engine   the interface: runs in and out, outcomes, errors kept apart
batch          requests checked and turned into tensors
passes         packed forward and backward passes, split where memory is short
run_state      one run's weights, gradient and moments
pending        the parts of an operation that goes through several passes
keeper         which runs are on the device and which are parked in host memory
adamw          the optimizer's arithmetic
state_file     snapshots as safetensors
"""
