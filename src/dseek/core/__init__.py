"""The ground floor: errors, environment registry, configuration, event hooks and the shape of a model.

Standard library only, so that every other room (and `import dseek` itself) can lean on it cheaply.
"""
