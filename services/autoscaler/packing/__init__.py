"""Puts replicas onto the fewest GPUs. Pure and deterministic: whole numbers in, names out, no clock, no solver.

Read `items` (the words), `fill` (one GPU), `shares` (many GPUs), `nodes` (several GPUs of a node), then `pack`.
"""
