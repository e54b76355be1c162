"""Decides how many samplers and trainers run, and on which GPUs. Pure up to the plan; actuators carry it out."""
