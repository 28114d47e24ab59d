import hashlib
from pathlib import Path

from fedward.tuning.small import build_bert, build_llama, build_qwen2, build_tokenizer

TEXTS = ["The patient reports chest pain.", "No fever, no cough at all."] * 20


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_any_text_survives_the_tokenizer():
    tokenizer = build_tokenizer(TEXTS, 300)
    text = "The patient: naïve 🩺"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == " " + text


def test_frequent_words_become_one_token():
    tokenizer = build_tokenizer(TEXTS, 400)
    assert len(tokenizer("patient patient")["input_ids"]) == 2


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    for build in (build_llama, build_qwen2, build_bert):
        found = []
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            folder = build(tmp_path / build.__name__ / name, build_tokenizer(TEXTS, 300), seed=seed)
            found.append([digest(folder / f) for f in ("model.safetensors", "tokenizer.json")])
        assert found[0] == found[1]
        assert found[0][0] != found[2][0]
