"""MONAI's DiNTS with its architecture as plain numbers.

MONAI keeps the architecture in tensors and asks these for each path, which torch.export and torch.compile cannot
follow. A trained network has one architecture, so the paths can be listed once; the same operations run in the same
order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def with_listed_paths(network: Any) -> nn.Module:
    """Replace the topology of a `monai.networks.nets.DiNTS` by one with the same cells under the same names.

    Args:
        network: Is changed.

    Returns:
        The network.
    """
    network.node_a = network.node_a.tolist()
    network.dints_space = ListedPaths(network.dints_space)
    return network  # type: ignore[no-any-return]


class ListedPaths(nn.Module):
    """The cells of a `TopologyInstance` (MONAI 1.6.1), block after block.

    Args:
        topology: MONAI's.
    """

    def __init__(self, topology: Any) -> None:
        super().__init__()
        self.cell_tree = topology.cell_tree
        self.num_depths: int = topology.num_depths
        self._blocks = [
            [
                (str((block, path)), topology.arch_code2in[path], topology.arch_code2out[path])
                for path, is_active in enumerate(row)
                if is_active
            ]
            for block, row in enumerate(topology.arch_code_a.tolist())
        ]

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Feature maps of each resolution -> the same shapes; a resolution that no path reaches is the number 0."""
        for paths in self._blocks:
            outputs = [x[0].new_zeros(())] * self.num_depths
            for name, source, target in paths:
                outputs[target] = outputs[target] + self.cell_tree[name](x=x[source], weight=None)
            x = outputs
        return x
