"""The classical yardstick: TF-IDF with logistic regression on pooled notes, without privacy."""

from collections.abc import Mapping, Sequence

from fedward.errors import ConfigurationError


def accuracy(
    train: Sequence[Mapping[str, str]],
    test: Sequence[Mapping[str, str]],
    *,
    text: str = "text",
    label: str = "label",
) -> float:
    """Accuracy on ``test`` of a logistic regression over words and word pairs of ``train``.

    Args:
        train: Rows of all sites, pooled.
        test: Held-out rows, at least one.
        text: Column of the text.
        label: Column of the class.

    Returns:
        0 to 1.

    Raises:
        ConfigurationError: scikit-learn is not installed (extra ``demo``).
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import accuracy_score
    except ImportError as error:
        raise ConfigurationError(
            "the classical baseline needs scikit-learn: pip install 'fedward[demo]'"
        ) from error
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(words.fit_transform([row[text] for row in train]), [row[label] for row in train])
    predicted = model.predict(words.transform([row[text] for row in test]))
    return float(accuracy_score([row[label] for row in test], predicted))
