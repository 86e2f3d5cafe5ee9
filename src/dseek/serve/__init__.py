"""Serving a model over HTTP: an OpenAI-compatible API, a web page, metrics, and a router over several replicas.

Needs the extra `serve`; `dseek.serve.requirements` says how to get it. Nothing here is imported unless one serves.
"""
