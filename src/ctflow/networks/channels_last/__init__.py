"""Networks with channels last, from a few operations (`ctflow.networks.operations`), each one GPU launch."""
