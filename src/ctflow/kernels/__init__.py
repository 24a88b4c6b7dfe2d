"""ctflow's own GPU kernels; `ctflow.networks.operations.TorchOperations` defines what each computes."""
