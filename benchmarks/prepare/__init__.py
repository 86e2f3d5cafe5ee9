"""One script for each form a model is prepared in; each runs in the environment that has the tools for it."""
