"""Trainers: execute the operations of the runs that they lease."""
