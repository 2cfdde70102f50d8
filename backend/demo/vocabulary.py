"""CLIP's tokenizer files over the words of our own prompts: byte-pair encoding (arXiv 1508.07909) on bytes, so any text tokenises."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from backend import artifacts

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def write_tokenizer(folder: Path, words: Iterable[str], *, pad: str) -> int:
    """Writes ``vocab.json``, ``merges.txt`` and the two settings files that CLIPTokenizer reads; returns the size of the vocabulary.

    Every word of ``words`` becomes one token; any other text falls back to pieces and single bytes. ``pad`` is END for SDXL's
    first tokenizer and '!' for its second.
    """
    merges = learn_merges(words)
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    artifacts.write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    artifacts.write_json(folder / "vocab.json", vocabulary)
    artifacts.write_json(folder / "special_tokens_map.json", special)
    artifacts.write_json(
        folder / "tokenizer_config.json", special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    )
    return len(vocabulary)


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges in order until every word is a single token: the most frequent neighbouring pair first, ties by the alphabet."""
    pieces = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(words)) if word]
    merges = []
    while counts := Counter(pair for word in pieces for pair in itertools.pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merged(word, best) for word in pieces]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    k = 0
    while k < len(word):
        if tuple(word[k : k + 2]) == pair:
            out.append("".join(pair))
            k += 2
        else:
            out.append(word[k])
            k += 1
    return out


def byte_alphabet() -> list[str]:
    """A printable character for each of the 256 bytes, in CLIP's order: printable Latin-1 as it is, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + k) for k in range(len(others))]
