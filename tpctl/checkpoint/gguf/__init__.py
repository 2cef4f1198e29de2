"""GGUF files to Hugging Face checkpoint folders, with nothing left out and nothing made up.

The file's header says everything before a byte of a weight is read: ``header`` reads it, ``parts`` joins the files of a
split model, ``model`` asks of it what is asked of a safetensors checkpoint (every parameter filled, every tensor used,
every setting understood) and refuses the rest by name. ``convert`` then writes the weights as bfloat16 and the
tokenizer beside them, in a child process.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What a key or a tensor's layout means is
llama.cpp's to say, and what the folder must hold is transformers'.
"""

from tpctl.checkpoint.gguf.convert import check_gguf, convert_gguf
from tpctl.checkpoint.gguf.model import GgufModel
from tpctl.checkpoint.gguf.parts import fetch_arguments, listed, model_files, model_name, part_files

__all__ = [
    "GgufModel",
    "check_gguf",
    "convert_gguf",
    "fetch_arguments",
    "listed",
    "model_files",
    "model_name",
    "part_files",
]
