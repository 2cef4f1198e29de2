"""Answers to schemas without a model: bytes that the masks allow."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from tests.schemas_parts import Schema
from tests.unit.fake_client import write_tokenizer
from tpctl.client.guides import check_guide
from tpctl.client.tokenizer import Tokenizer
from tpctl.engine.guiding.grammars import Grammars
from tpctl.wire.guide import of_schema
from tpctl.wire.sampling import SamplingParams

END, ENDS = 256, b'"]},'


class Walks:
    """A model that answers with any byte that the mask allows, rather with one that ends something."""

    def __init__(self, folder: Path) -> None:
        write_tokenizer(folder)
        self.tokenizer = Tokenizer(folder)
        self.grammars = Grammars(folder)
        self.grammars.suit(300, [END])
        self.ends = {id for byte in ENDS for id in self.tokenizer.encode(chr(byte))} | {END}

    def matcher(self, schema: Schema) -> Any:
        """Raises ``RequestError`` for what is not taken."""
        guide = SamplingParams(response_format=of_schema(schema)).guide
        assert guide is not None
        check_guide(guide)
        return self.grammars.matcher(guide)

    def answer(self, schema: Schema, seed: int, most: int = 500) -> str | None:
        """``None``: it had not ended after ``most`` bytes."""
        chance, matcher, tokens = random.Random(seed), self.matcher(schema), []
        while len(tokens) < most:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits).tolist()
            ending = [token for token in allowed if token in self.ends]
            token = chance.choice(ending if ending and chance.random() < 0.3 else allowed)
            if token == END:
                return self.tokenizer.decode(tokens)
            assert matcher.consume_token(token)
            tokens.append(token)
            if matcher.is_stopped():
                return self.tokenizer.decode(tokens)
        return None

    def takes(self, schema: Schema, text: str) -> bool:
        """Whether a model might answer this."""
        ids, matcher = [*self.tokenizer.encode(text), END], self.matcher(schema)
        left = len(ids) - matcher.try_consume_tokens(ids)
        return left == 0 or (left == 1 and matcher.is_stopped())
