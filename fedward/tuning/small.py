"""Small models made here: a tokenizer trained on given texts, and models drawn from a seed.

The demo trains one of them into its base; tests use them as they are.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

_PAD, _END = "<pad>", "<eos>"
_CHAT = (
    "{% for message in messages %}<{{ message.role }}>\n{{ message.content }}" + _END + "\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Args:
        texts: Public texts: the vocabulary repeats their words.
        vocabulary: Most tokens, at least 258 (every byte, ``<pad>`` and ``<eos>``).

    Returns:
        A tokenizer that encodes any text, with a pad and an end token and a plain chat template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PAD, _END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # theirs has no annotations
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END
    )
    fast.chat_template = _CHAT
    return fast


def build_llama(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    max_length: int = 128,
    seed: int = 0,
    labels: Sequence[str] = (),
) -> Path:
    """Save a Llama drawn from a seed, and its tokenizer, into a folder.

    Args:
        folder: Made if it is not there.
        tokenizer: Gives vocabulary, pad and end token.
        hidden: Width, a multiple of ``heads``; of 64 where NF4 shall hold it.
        layers: Transformer blocks.
        heads: Attention heads.
        max_length: Longest input in tokens.
        seed: Seed of the weights.
        labels: Classes of a sequence classifier; without any it is a causal language model.

    Returns:
        The folder.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
    )
    return _save(folder, tokenizer, config, seed, labels)


def build_qwen2(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    max_length: int = 128,
    seed: int = 0,
    labels: Sequence[str] = (),
) -> Path:
    """Save a Qwen2 (biases in attention, tied embeddings); arguments as in :func:`build_llama`."""
    config = Qwen2Config(
        # transformers opens a Qwen2 folder with a class of its own, which adds one token.
        vocab_size=len(tokenizer) + 1,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
    )
    return _save(folder, tokenizer, config, seed, labels)


def build_bert(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    max_length: int = 128,
    seed: int = 0,
    labels: Sequence[str] = ("no", "yes"),
) -> Path:
    """Save a BERT classifier; arguments as in :func:`build_llama`."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
    )
    return _save(folder, tokenizer, config, seed, labels)


def _save(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    config: PreTrainedConfig,
    seed: int,
    labels: Sequence[str],
) -> Path:
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.bos_token_id = None
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    with torch.random.fork_rng():  # transformers draws weights from the global generator
        torch.manual_seed(seed)
        model = kind.from_config(config)  # type: ignore[no-untyped-call]  # as above
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
