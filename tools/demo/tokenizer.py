"""A byte-level BPE tokenizer of 4096 entries, and texts turned into one token stream."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# A power of two: it splits over 2 and 4 ranks and does not divide by 3, the uneven case the engine has to handle.
VOCAB_SIZE = 4096
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2


def train_tokenizer(texts: Iterable[str], max_tokens: int) -> PreTrainedTokenizerFast:
    """Learn the merges from `texts` (training files only). Every byte is in the alphabet, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"{tokenizer.get_vocab_size()} of {VOCAB_SIZE} tokens: too little text; raise --max-files")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> NDArray[np.int64]:
    """All texts in one 1-D stream: EOS, then for each text BOS, its tokens, EOS.

    The leading EOS gives the first BOS the two-token history that every other one has, so that the model and the
    trigram are scored on exactly the same tokens, `stream[2:]`.
    """
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts))
    parts = [np.array([EOS_ID], dtype=np.int64)]
    for encoding in encoded:
        parts += [np.array(encoding.ids, dtype=np.int64), np.array([EOS_ID], dtype=np.int64)]
    return np.concatenate(parts)
