"""What site and coordinator share: base models, PEFT methods, objectives, data, metrics."""

import os

# Read when transformers is imported: its bars would run through the command line's own progress.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
