"""Parts of ``central.py``: what is trained, and the two sides that train it."""
