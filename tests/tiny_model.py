"""A model that is real in everything but size: made on the spot, with a tokenizer of its own and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

_TEXT = [
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    "<|im_start|>user\nWhat is your name?<|im_end|>\n<|im_start|>assistant\nMy name is Loomis.<|im_end|>\n",
    "<|im_start|>user\nHow many legs has a spider?<|im_end|>\n<|im_start|>assistant\nA spider has eight.<|im_end|>\n",
    "The quick brown fox jumps over the lazy dog, while 12 of 345 numbers add up to 6789.",
]


def make_tiny_model(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a 2-layer random Llama in float32 and its tokenizer (byte-level BPE, ChatML) into `folder`, and return it.

    `<|endoftext|>` pads, `<|im_end|>` ends; the same seed gives the same weights. About 100 thousand parameters.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(folder)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=-(-len(tokenizer) // 64) * 64,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=32,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                dtype=torch.float32,
            )
        )
    model.save_pretrained(folder)
    return folder


def small_model(name: str = "Llama", **options: Any) -> Any:
    """A random model of one of transformers' types, by the name that its `...Config` begins with; always the same."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, **options,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)
