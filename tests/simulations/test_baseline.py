"""The classical baseline: what it reaches on the demo, and what it cannot."""

import subprocess
import sys

from fedward.simulations.baseline import accuracy
from fedward.simulations.notes import SERVICES, generate


def test_it_learns_a_separable_task():
    rows = [{"text": f"{name} now", "label": name} for name in SERVICES] * 5
    assert accuracy(rows, rows) == 1.0


def test_labels_dealt_at_random_are_not_learned():
    train = [{"text": f"word{i % 7}", "label": SERVICES[i % 5]} for i in range(700)]
    assert accuracy(train, train) < 0.4


def test_the_demo_is_worth_learning_and_not_trivial():
    world = generate(0)
    pooled = [row for rows in world.train.values() for row in rows]
    reached = accuracy(pooled, world.test)
    assert 0.75 < reached < 0.93
    # The words alone decide less: each hospital's own notes do not carry over to the others.
    assert accuracy(world.train["valley"], world.test) < reached - 0.15


def test_columns_are_configurable():
    rows = [{"note": word, "service": word} for word in ("heart", "lungs")] * 3
    assert accuracy(rows, rows, text="note", label="service") == 1.0


def test_without_scikit_learn_the_message_names_the_extra():
    script = (
        "import sys; sys.modules['sklearn.feature_extraction.text'] = None\n"
        "from fedward.simulations.baseline import accuracy\n"
        "accuracy([], [])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "fedward[demo]" in done.stderr
