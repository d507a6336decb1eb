"""Small, tested implementations behind the chapters of Noise to Tokens."""

from importlib.metadata import version

__version__ = version("noise2tokens")
