"""Cheap head scores, found in minutes: attention mass beyond the window, output error when a head is windowed, random."""

from .ablation import ablation_scores
from .mass import mass_scores
from .sequences import Sequence, clip_sequences, read_prompts, solve, text_sequences
from .shuffled import random_scores

__all__ = ["Sequence", "ablation_scores", "clip_sequences", "mass_scores", "random_scores", "read_prompts", "solve", "text_sequences"]
