"""Serving on a Ray cluster: engines as Ray Serve deployments, the gateway in front of them as another."""
