"""DeepHair: try on a hairstyle at your photo's own resolution."""

__version__ = "0.1.0"
