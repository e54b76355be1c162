"""The environments that come with the service."""
