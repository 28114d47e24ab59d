"""Parts of ``dp_step.py``: models, the ways to take a step, and what a step holds in memory."""
