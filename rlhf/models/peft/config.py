"""`*.peft`: what of a model is trained, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from rlhf.config import Strict
from rlhf.models.peft.methods import METHODS, MethodName


class PeftConfig(Strict):
    """Which parameters are trained: `sft.peft=lora`, or `sft.peft={method:lora,rank:8}`.

    What each method is, its source and what works with it: rlhf/models/peft/methods.py.
    """

    method: MethodName
    """none trains all parameters."""
    rank: PositiveInt = 16
    """lora, dora, qlora: rank of the update."""
    alpha: PositiveInt = 32
    """lora, dora, qlora: the update is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """lora, dora, qlora: the linear layers that are updated, by the last part of their names."""
    layers: PositiveInt = 2
    """freeze: how many of the model's last layers are trained."""
    placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """adapter: a bottleneck after each feed-forward layer; or also after attention."""
    size: PositiveInt = 64
    """adapter: size of the bottlenecks."""
    tokens: PositiveInt = 20
    """prefix, prompt, p_tuning: virtual tokens before every row."""

    @model_validator(mode="after")
    def _reads_what_is_set(self) -> Self:
        unread = self.model_fields_set - {"method", *METHODS[self.method].knobs}
        if unread:
            known = ", ".join(METHODS[self.method].knobs) or "no other key"
            raise ValueError(
                f"KEY.method={self.method} does not read {', '.join(sorted(unread))}; it reads {known}. "
                "Remove the others"
            )
        return self

    @model_serializer(mode="wrap")
    def _what_is_read(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that another method's defaults are not part of an artifact's key."""
        values: dict[str, Any] = serialize(self)
        return {key: values[key] for key in ("method", *METHODS[self.method].knobs)}


Peft = Annotated[
    PeftConfig, BeforeValidator(lambda value: {"method": value} if isinstance(value, str) else value)
]
