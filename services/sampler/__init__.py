"""Samplers: generate from a base model and its policies."""
