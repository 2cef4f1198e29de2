"""The command line's side of the engine: tokenizer, detokenizer, chat template, requests. No torch."""
