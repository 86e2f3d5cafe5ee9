"""Running a model: requests, the scheduler, the paged cache, runners and the sampler.

The loop is `Engine.step` (`engine.py`): schedule, run, postprocess. `llm.py` is the friendly face over it.
"""
