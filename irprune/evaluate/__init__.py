"""How good a language model is: perplexity of texts, and zero-shot accuracy on tasks.

Both ask a model for the same thing, the logits of token rows, so a torch program and an ONNX file are
measured alike; see :mod:`irprune.evaluate.predictor`.
"""

from irprune.evaluate.perplexity import Perplexity, perplexity, read_text, tokenised
from irprune.evaluate.predictor import Predictor

__all__ = ["Perplexity", "Predictor", "perplexity", "read_text", "tokenised"]
