"""Build the demo model: a transformers tokenizer and a Llama of at most a quarter of a million parameters."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import ContextTemplate

PAD, EOS, UNK, USER, ASSISTANT = "<pad>", "<eos>", "<unk>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{{ m.content }}<eos>"
    "{% else %}<user>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_LENGTH = 192


def build_tokenizer(vocabulary: tuple[str, ...], template: ContextTemplate) -> PreTrainedTokenizerFast:
    """Build a tokenizer of words, single digits and single signs.

    Turn and block markers are special tokens. White space separates and has no token.
    """
    special = [PAD, EOS, UNK, USER, ASSISTANT, *(end for block in template.blocks() for end in block)]
    words = {word: index for index, word in enumerate([*special, *vocabulary])}
    core = Tokenizer(models.WordLevel(words, unk_token=UNK))
    signs = pre_tokenizers.Split(Regex(r"\d|[^\w\s]"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), signs])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the model with random weights, which depend on `warm_seed` alone."""
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.tiny_hidden,
        intermediate_size=round(2.5 * config.tiny_hidden),
        num_hidden_layers=config.tiny_layers,
        num_attention_heads=config.tiny_heads,
        num_key_value_heads=config.tiny_heads,
        max_position_embeddings=MAX_LENGTH,
        # At transformers' .02 one seed knew no addition after 1250 steps; at .06 the warm start took 725.
        initializer_range=0.06,
        # Positions within 30 tokens; 10000 learns the contexts more slowly.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Forked, so that the new model does not advance the generator of the run.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.warm_seed)
        return LlamaForCausalLM(shape)
