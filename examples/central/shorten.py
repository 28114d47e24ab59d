"""Keep only the end of long prompts, for models that read few tokens.

    python examples/central/shorten.py ../shared/data/pref_qa_feedback out/pref_qa_feedback 300

TRL leaves out every pair that is longer than ``max_length``, from training and from evaluation.
"""

import gzip
import json
import sys
from pathlib import Path


def main(source: Path, target: Path, characters: int) -> None:
    """Write every JSONL file of a folder with the last characters of each prompt."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.jsonl*")):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        rows = [json.loads(line) for line in text.splitlines()]
        short = [{**row, "prompt": row["prompt"][-characters:]} for row in rows]
        name = path.name.removesuffix(".gz")
        (target / name).write_text("".join(json.dumps(row) + "\n" for row in short))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
