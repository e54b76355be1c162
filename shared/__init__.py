"""What every service of the mesh stands on: contracts, the bus, workers, blobs, configuration, observation.

Nothing here imports a service, and nothing outside `shared.models` and `shared.text` imports an ML library.
"""
