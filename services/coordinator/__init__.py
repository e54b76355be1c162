"""Coordinators: drive jobs from their specification to a trained policy."""
