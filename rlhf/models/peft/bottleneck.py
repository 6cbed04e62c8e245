"""Bottleneck adapters as a peft tuner. peft has none; the package adapters 1.3 has them, but needs
transformers 4.57, and this project uses 5.

After the last linear layer of a sub-layer, before the residual connection, comes h + up(relu(down(h))). `up`
starts at zero, so the model does not change at first. Houlsby et al. 2019 (arXiv:1902.00751, figure 2) put
one after attention and one after the feed-forward layer. Pfeiffer et al. 2020 (arXiv:2005.00247, section 3)
put only the second one. It is not a linear function of the input, so it cannot be merged into weights.
Dimensions: H hidden size, S size of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from peft import PeftConfig as TunerConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

KIND, NAMES = "BOTTLENECK", "bottleneck_"
"""The method's name in peft's files, and the prefix of its modules' names."""


@dataclass
class BottleneckConfig(TunerConfig):
    """The content of adapter_config.json."""

    size: int = 64
    """S."""
    target_modules: Iterable[str] | None = None
    """The linear layers that a bottleneck follows, by the ends of their names."""
    modules_to_save: list[str] | None = None
    """Other modules that train: a score head."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # peft's
        self.peft_type = KIND
        self.target_modules = set(self.target_modules or ())


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer followed by bottlenecks, each with an adapter's name."""

    adapter_layer_names: tuple[str, ...] = (f"{NAMES}down", f"{NAMES}up")

    def __init__(self, base_layer: nn.Module, name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active_adapter = name
        self.update_layer(name, config)

    def update_layer(self, name: str, config: BottleneckConfig) -> None:
        """Add an adapter. `down` is initialized like torch's linear layers."""
        linear = self.get_base_layer()
        assert isinstance(linear, nn.Linear)
        size = linear.out_features
        down, up = nn.Linear(size, config.size), nn.Linear(config.size, size)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """[..., in] -> [..., H]. Each adapter gets the result of the one before it."""
        hidden: Tensor = self.base_layer(x, *args, **options)
        if self.disable_adapters:
            return hidden
        for name in self.active_adapters:
            hidden = hidden + self.bottleneck_up[name](self.bottleneck_down[name](hidden).relu())
        return hidden


class BottleneckModel(BaseTuner):
    """Puts bottlenecks after linear layers, in place."""

    prefix: str = NAMES
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _create_and_replace(
        self,
        config: TunerConfig,
        name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(config, BottleneckConfig)
        if isinstance(target, BottleneckLayer):
            target.update_layer(name, config)
        else:
            self._replace_module(parent, target_name, BottleneckLayer(target, name, config), target)


_kind = cast(PeftType, KIND)  # register_peft_method takes the methods of that enumeration only
PEFT_TYPE_TO_CONFIG_MAPPING[_kind] = BottleneckConfig
PEFT_TYPE_TO_TUNER_MAPPING[_kind] = BottleneckModel
PEFT_TYPE_TO_PREFIX_MAPPING[_kind] = NAMES
