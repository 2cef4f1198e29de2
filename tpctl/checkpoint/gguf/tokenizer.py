"""The tokenizer's files of a converted model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpctl.checkpoint.gguf.header import GgufError
from tpctl.checkpoint.gguf.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "▁"


def write_tokenizer(vocabulary: Vocabulary, context: int, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat templates into ``folder``.

    Raises:
        GgufError: the merges do not fit the tokens.
    """
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **{f"{name}_token": vocabulary.tokens[place] for name, place in vocabulary.special.items()},
    }
    _write_json(folder / "tokenizer_config.json", config)
    for name, template in vocabulary.templates.items():
        file = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(template.encode())


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer as an object of the ``tokenizers`` library. Errors as ``write_tokenizer``."""
    from tokenizers import Tokenizer, models

    byte_level = vocabulary.pre_tokenizer is not None
    unknown = vocabulary.special.get("unk")
    merges = derived_merges(vocabulary) if vocabulary.merges is None else vocabulary.merges
    try:
        model = models.BPE(
            vocab={token: place for place, token in enumerate(vocabulary.tokens)},
            merges=list(merges),
            unk_token=None if byte_level or unknown is None else vocabulary.tokens[unknown],
            fuse_unk=not byte_level,
            byte_fallback=not byte_level,
            ignore_merges=vocabulary.pre_tokenizer is not None and vocabulary.pre_tokenizer.whole_words,
        )
    except Exception as error:  # the library raises bare Exception
        raise GgufError(f"its tokenizer's merges do not fit its tokens ({error}); download it again") from None
    tokenizer = Tokenizer(model)
    _add_steps(tokenizer, vocabulary)
    _add_tokens(tokenizer, vocabulary)
    _add_ends(tokenizer, vocabulary)
    return tokenizer


def derived_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges behind a sentencepiece vocabulary: each token from any two others, the best scores first.

    The order among equals is that of transformers' own conversion of sentencepiece models, which decides between two
    ways to the same token.
    """
    places = {token: place for place, token in enumerate(vocabulary.tokens)}
    found = []
    for token, score in zip(vocabulary.tokens, vocabulary.scores, strict=True):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in places and pair[1] in places]
        found += [(score, *pair) for pair in sorted(known, key=lambda pair: (places[pair[0]], places[pair[1]]))]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _add_steps(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """What happens to a text before the merges, and to tokens on their way back."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    rule = vocabulary.pre_tokenizer
    if rule is not None:
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
        if rule.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(rule.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        if rule.composed:
            tokenizer.normalizer = normalizers.NFC()
        return
    if vocabulary.strips:
        # Phi-3's puts a space before every piece of text between control tokens, Llama's before the first alone.
        before = [normalizers.Prepend(_SPACE)] if vocabulary.space_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    else:
        scheme = "first" if vocabulary.space_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    after = [decoders.Strip(" ", 1, 0)] if vocabulary.space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Tokens that are matched in a text as a whole: control tokens, and those that the model's maker added."""
    from tokenizers import AddedToken

    special = set(vocabulary.special.values())
    documents = {"<unk>", "<s>", "<|endoftext|>"}  # of Phi-3's, these alone leave the white space
    control, plain = [], []
    for place, token in enumerate(vocabulary.tokens):
        kind = vocabulary.types[place] if vocabulary.types else 0
        if kind in (CONTROL, UNKNOWN) or place in special:
            strip = vocabulary.strips and token not in documents
            control.append(AddedToken(token, normalized=False, special=True, rstrip=strip))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(plain)
    if tokenizer.get_vocab_size() != len(vocabulary.tokens):
        raise GgufError("its tokenizer's added tokens do not fit its vocabulary; download it again")


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """The tokens that are put around every text."""
    from tokenizers import processors

    tokens = {"bos": vocabulary.add_bos, "eos": vocabulary.add_eos}
    ids = {vocabulary.tokens[vocabulary.special[name]]: vocabulary.special[name] for name in tokens if tokens[name]}
    if not ids:
        return
    first, last = (vocabulary.tokens[vocabulary.special[name]] if tokens[name] else None for name in ("bos", "eos"))

    def around(text: str, part: int) -> list[str]:
        pieces = (first and f"{first}:{part}", f"{text}:{part}", last and f"{last}:{part}")
        return [piece for piece in pieces if piece]

    single = around("$A", 0)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=single + around("$B", 1), special_tokens=list(ids.items())
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
