"""A tiny Llama that reads characters, and a text for it: what the tests of the evaluation share."""

import string

from models import tiny_llama
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from kvcluster.evaluation.texts import built_in_text


def character_tokenizer():
    """Every printable ASCII character is a token, 1 to 96; all others are token 0."""
    characters = [*sorted(set(string.printable) - set("\t\r\x0b\x0c"))]
    vocabulary = {"<unk>": 0} | {character: number for number, character in enumerate(characters, 1)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=False)


def long_llama(**config):
    """`tiny_llama` with more positions."""
    model = tiny_llama(**config)
    model.config.max_position_embeddings = 4096
    return model


def short_text():
    return built_in_text()[:40_000]


def save_character_llama(folder):
    """A folder in transformers' format."""
    long_llama().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder
