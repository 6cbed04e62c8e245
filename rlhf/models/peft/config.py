"""`*.peft`: which parameters of a model are trained, and how."""

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

    rlhf/models/peft/methods.py has each method's source and abilities.
    """

    method: MethodName
    """The tuning method; none trains all parameters."""
    rank: PositiveInt = 16
    """lora, dora, qlora: rank of the update."""
    alpha: PositiveInt = 32
    """lora, dora, qlora: the update is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """lora, dora, qlora: linear layers to update, by the last part of their names."""
    layers: PositiveInt = 2
    """freeze: number of the model's last layers that are trained."""
    placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """adapter: pfeiffer puts a bottleneck after each feed-forward layer, houlsby also after attention."""
    size: PositiveInt = 64
    """adapter: size of the bottlenecks."""
    tokens: PositiveInt = 20
    """prefix, prompt, p_tuning: number of virtual tokens before every row."""

    @model_validator(mode="after")
    def _check_unread_keys(self) -> Self:
        unread = self.model_fields_set - {"method", *METHODS[self.method].knobs}
        if unread:
            known = ", ".join(METHODS[self.method].knobs) or "no other key"
            raise ValueError(
                f"KEY.method={self.method} does not read {', '.join(sorted(unread))}; it reads {known}. "
                "Remove the others"
            )
        return self

    @model_serializer(mode="wrap")
    def _serialize_read_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialize only the keys that the method reads, so that no other method's defaults enter an
        artifact's key."""
        values: dict[str, Any] = serialize(self)
        return {key: values[key] for key in ("method", *METHODS[self.method].knobs)}


Peft = Annotated[
    PeftConfig, BeforeValidator(lambda value: {"method": value} if isinstance(value, str) else value)
]
