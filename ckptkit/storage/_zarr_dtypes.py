"""Which dtypes zarr stores, as TensorStore's drivers for both versions have it, and what to do with the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["V2_DTYPES", "V3_DTYPES", "substitute", "v2_name"]

_NUMPY_NAMES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_ML_NAMES = (
    *("bfloat16", "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "int2", "int4"),
)
V3_DTYPES: Mapping[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in _NUMPY_NAMES},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _ML_NAMES if hasattr(ml_dtypes, name)},
}
"""By the name in a version 3 document, which is numpy's."""

V2_DTYPES: Mapping[str, np.dtype[Any]] = {
    **{np.dtype(name).newbyteorder("<").str: np.dtype(name) for name in _NUMPY_NAMES},
    **{np.dtype(name).newbyteorder(">").str: np.dtype(name) for name in _NUMPY_NAMES},
    **{name: dtype for name, dtype in V3_DTYPES.items() if name in _ML_NAMES},
}
"""By the name in a version 2 document; both byte orders."""

# The dtype that holds every value of one that cannot be stored, where there is one.
_HOLDS = {
    "float6_e2m3fn": "float8_e4m3fn",
    "float6_e3m2fn": "float8_e5m2",
    "float8_e4m3": "bfloat16",
    "int1": "int8",
    "uint1": "uint8",
    "uint2": "uint8",
    "uint4": "uint8",
    "complex32": "complex64",
    "bcomplex32": "complex64",
}
_ADVICE_BY_KIND = {
    "M": "store .view('int64') and keep the unit beside it",
    "m": "store .view('int64') and keep the unit beside it",
    "O": "convert it to an array of numbers",
    "S": "store the bytes as np.frombuffer(..., 'uint8')",
    "U": "save each string as a str leaf",
    "T": "save each string as a str leaf",
    "f": "cast it to float64",
    "c": "cast it to complex128",
    "V": "store each field as an array of its own",
}


def v2_name(dtype: np.dtype[Any]) -> str:
    """The word of a version 2 document for a dtype stored little-endian."""
    return dtype.name if dtype.name in _ML_NAMES else dtype.newbyteorder("<").str


def substitute(dtype: np.dtype[Any]) -> str:
    """What to do with an array of a dtype that zarr lacks."""
    holder = _HOLDS.get(dtype.name)
    return f"cast it to {holder}, which holds all its values" if holder else _ADVICE_BY_KIND.get(dtype.kind, "cast it")
