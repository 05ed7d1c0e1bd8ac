"""Models and repairs in files: our own layout, Hugging Face folders, GGUF, adapters. Nothing is ever unpickled."""
import engine.script  # noqa: F401, before torch: Ctrl-C is one line
from checkpoints.native import load, save
from checkpoints.weights import load_pretrained, read_model

__all__ = ["load", "load_pretrained", "read_model", "save"]
