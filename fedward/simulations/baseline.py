"""The classical yardstick: TF-IDF with logistic regression on pooled notes, without privacy."""

from fedward.errors import ConfigurationError
from fedward.plan import Plan
from fedward.tuning.prompts import input_text
from fedward.tuning.records import Records


def accuracy(plan: Plan, train: Records, test: Records) -> float:
    """Accuracy on ``test`` of a logistic regression over words and word pairs of ``train``.

    Args:
        plan: Its objective is ``classify``. Of each record as many words are read as the model
            would see tokens.
        train: Records of all sites, pooled.
        test: Held-out records, at least one.

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

    def texts(records: Records) -> list[str]:
        most = plan.task.max_length
        return [" ".join(input_text(row, plan.data).split()[:most]) for row in records.rows]

    def labels(records: Records) -> list[str]:
        return [str(row[plan.data.label]) for row in records.rows]

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(words.fit_transform(texts(train)), labels(train))
    predicted = model.predict(words.transform(texts(test)))
    return float(accuracy_score(labels(test), predicted))
