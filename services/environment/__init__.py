"""Plays episodes: prompts, samples, steps of the environment."""
