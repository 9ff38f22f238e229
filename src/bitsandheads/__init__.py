"""KV-cache compression for transformers: fewer bits, fewer heads.

import bitsandheads

bitsandheads.enable(model)
out = model.generate(**inputs, past_key_values=bitsandheads.CompressedCache("balanced", model))
"""

from .errors import (
    AttentionNotEnabledError,
    BackendError,
    BitsAndHeadsError,
    CacheStateError,
    FileFormatError,
    ModelMismatchError,
    NotFiniteError,
    PlanError,
    ShapeError,
)
from .methods import get_plan, preset_names
from .methods.heads import compose, rlkv
from .plan import CachePlan, HeadGroup, LayerShape, Window
from .quant.spec import AxisClass, KVQuant, Salience, TensorQuant
from .saving import load_cache, save_cache
from .scores import HeadScores
from .seam import CompressedCache, disable, enable, enabled

__version__ = "0.1.0"

__all__ = [
    "AttentionNotEnabledError",
    "AxisClass",
    "BackendError",
    "BitsAndHeadsError",
    "CachePlan",
    "CacheStateError",
    "CompressedCache",
    "FileFormatError",
    "HeadGroup",
    "HeadScores",
    "KVQuant",
    "LayerShape",
    "ModelMismatchError",
    "NotFiniteError",
    "PlanError",
    "Salience",
    "ShapeError",
    "TensorQuant",
    "Window",
    "compose",
    "disable",
    "enable",
    "enabled",
    "get_plan",
    "load_cache",
    "preset_names",
    "rlkv",
    "save_cache",
]
