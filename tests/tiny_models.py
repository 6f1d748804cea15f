"""Makes two tiny random-weight models on disk: the architectures of Falcon3 and Falcon-H1.

    python tests/tiny_models.py OUT_DIR

Real models for the real engine, with a tokenizer and a chat template, under 0.5 MB each.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 512
END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRAINING_TEXT = ["Say hello in one word.", "The quick brown fox jumps over the lazy dog."] * 20


def make_llama(path: Path) -> Path:
    """Make the architecture of Falcon3-1B-Instruct (`LlamaForCausalLM`) at `path`, once."""
    return _make_once(path, _llama, seed=0)


def make_falcon_h1(path: Path) -> Path:
    """Make the architecture of Falcon-H1-0.5B-Instruct (attention and Mamba) at `path`, once."""
    return _make_once(path, _falcon_h1, seed=1)


def _make_once(path: Path, build: Callable[[], Any], seed: int) -> Path:
    """Save a model and its tokenizer at `path` in one step, so that it is whole or not there."""
    if path.exists():
        return path
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)  # one each: with the same, both would give the same answers
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    build().to(torch.bfloat16).save_pretrained(unfinished)
    _tokenizer().save_pretrained(unfinished)
    unfinished.rename(path)
    return path


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_common_shape()))


def _falcon_h1() -> Any:
    from transformers import FalconH1Config, FalconH1ForCausalLM

    return FalconH1ForCausalLM(
        FalconH1Config(
            mamba_d_ssm=128,
            mamba_n_heads=4,
            mamba_d_head=32,
            mamba_d_state=16,
            mamba_n_groups=1,
            **_common_shape(),
        )
    )


def _common_shape() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def _tokenizer() -> Any:
    """Train a byte-level BPE tokenizer in memory: any text encodes, nothing is downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TRAINING_TEXT,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main(argv: list[str]) -> int:
    """Make both models under the directory that is given, and print where they are."""
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(argv[0]).resolve()
    print(make_llama(out / "falcon3"))
    print(make_falcon_h1(out / "falcon-h1"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
