"""Replicas as a Ray Serve deployment, over one or several nodes. Nothing here is imported unless Ray is asked for."""
