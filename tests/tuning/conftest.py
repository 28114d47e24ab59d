import pytest

from fedward.tuning.small import build_bert, build_llama, build_qwen2, build_tokenizer
from tests.tuning.rig import LABELS, TEXTS


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny models; ``classifier`` is a Llama with a head of its own."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer(TEXTS, 400)
    return {
        "llama": build_llama(root / "llama", tokenizer),
        "qwen2": build_qwen2(root / "qwen2", tokenizer),
        "bert": build_bert(root / "bert", tokenizer, labels=LABELS),
        "classifier": build_llama(root / "classifier", tokenizer, labels=LABELS),
    }
