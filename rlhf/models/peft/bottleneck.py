"""Bottleneck adapters as a peft tuner. peft has none; the package adapters 1.3 has them, but needs
transformers 4.57, and this project uses 5.

A bottleneck computes h + up(relu(down(h))) from h, the output of a sub-layer's last linear layer, before the
residual connection. `up` starts at zero, so the model does not change at first. Houlsby et al. 2019
(arXiv:1902.00751, figure 2) put one after attention and one after the feed-forward layer. Pfeiffer et al.
2020 (arXiv:2005.00247, section 3) put only the second one. A bottleneck is not linear, so it cannot be merged
into weights. Dimensions: H hidden size, S size of the bottleneck.
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

PEFT_TYPE, MODULE_PREFIX = "BOTTLENECK", "bottleneck_"
"""The method's name in peft's files, and the prefix of its modules' names."""


@dataclass
class BottleneckConfig(TunerConfig):
    """The content of adapter_config.json."""

    size: int = 64
    """S, the size of the bottleneck."""
    target_modules: Iterable[str] | None = None
    """Linear layers after which a bottleneck is added, by the ends of their names."""
    modules_to_save: list[str] | None = None
    """Other modules that train, such as a score head."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # peft's
        self.peft_type = PEFT_TYPE
        self.target_modules = set(self.target_modules or ())


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer followed by bottlenecks, one for each adapter name."""

    adapter_layer_names: tuple[str, ...] = (f"{MODULE_PREFIX}down", f"{MODULE_PREFIX}up")

    def __init__(self, base_layer: nn.Module, name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active_adapter = name
        self.update_layer(name, config)

    def update_layer(self, name: str, config: BottleneckConfig) -> None:
        """Add a bottleneck. `down` is initialised like torch's linear layers."""
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
        """[..., in] -> [..., H]. Each bottleneck gets the result of the one before it."""
        hidden: Tensor = self.base_layer(x, *args, **options)
        if self.disable_adapters:
            return hidden
        for name in self.active_adapters:
            hidden = hidden + self.bottleneck_up[name](self.bottleneck_down[name](hidden).relu())
        return hidden


class BottleneckModel(BaseTuner):
    """Puts bottlenecks after linear layers, in place."""

    prefix: str = MODULE_PREFIX
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


_peft_type = cast(PeftType, PEFT_TYPE)  # register_peft_method accepts only members of PeftType
PEFT_TYPE_TO_CONFIG_MAPPING[_peft_type] = BottleneckConfig
PEFT_TYPE_TO_TUNER_MAPPING[_peft_type] = BottleneckModel
PEFT_TYPE_TO_PREFIX_MAPPING[_peft_type] = MODULE_PREFIX
