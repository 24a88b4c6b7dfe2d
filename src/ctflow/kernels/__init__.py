"""GPU kernels of our own: what each computes is told by `ctflow.networks.operations.TorchOperations`."""
