"""What simple rules reach on preference pairs: the longer answer wins; a linear model of its words.

The linear model is logistic regression without intercept on the difference of both answers' TF-IDF
vectors (words and pairs of words), at four strengths of its penalty, all shown. Intervals are
bootstraps over units.

    python examples/central/baselines.py ../shared/data/pref_qa_feedback --unit question_id
"""

# ruff: noqa: T201  # it prints a table

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, vstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from fedward.tuning.records import find_splits, read_table
from fedward.tuning.resampling import Units, bootstrap, units_of

PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""scikit-learn's C: the inverse of the penalty's strength."""


def read(path: Path, unit: str) -> tuple[list[str], list[str], Units]:
    """Preferred answers, the others, and which pairs belong together."""
    rows = [row for row in read_table(path).rows if row is not None]
    chosen, rejected = ([str(row[key]) for row in rows] for key in ("chosen", "rejected"))
    return chosen, rejected, units_of([row[unit] for row in rows])


def show(name: str, margins: npt.NDArray[np.float64], units: Units) -> None:
    """One rule's accuracy, a tie counting half, with its 95 % interval."""
    right = (np.sign(margins) + 1) / 2
    low, high = bootstrap(lambda rows: np.array([right[rows].mean()]), units)
    print(f"| {name} | {right.mean():.3f} ({low[0]:.3f}–{high[0]:.3f}) |")  # noqa: RUF001  # a range


def main() -> None:
    """Read the options, fit and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="a folder with train and test pairs")
    parser.add_argument("--unit", required=True, help="the column that says what belongs together")
    options = parser.parse_args()
    splits = find_splits(options.data)
    chosen, rejected, _ = read(splits["train"], options.unit)
    better, worse, units = read(splits["test"], options.unit)
    print("| rule | preference accuracy, 95 % interval |\n|---|---|")
    lengths = [len(a) - len(b) for a, b in zip(better, worse, strict=True)]
    show("longer wins", np.array(lengths, np.float64), units)
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    learned: csr_matrix = words.fit_transform(chosen) - words.transform(rejected)
    asked = words.transform(better) - words.transform(worse)
    both, signs = vstack([learned, -learned]), [1] * len(chosen) + [0] * len(chosen)
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, fit_intercept=False, max_iter=2000).fit(both, signs)
        show(f"TF-IDF, C = {penalty:g}", model.decision_function(asked), units)


if __name__ == "__main__":
    main()
