"""baft changes what a language model knows, without touching its weights."""

__version__ = "0.1.0"
