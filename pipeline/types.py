"""Annotated number types for validated options: msgspec rejects a value out of range and names the field."""

from typing import Annotated

from msgspec import Meta

PositiveInt = Annotated[int, Meta(gt=0)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(ge=0, lt=1)]  # of dropout: 1 would drop everything
